"""What Triton's interpreter gets wrong, mended for the tests.

It cuts float32 off where it writes bfloat16; a GPU rounds to nearest. And that of 3.6 makes numbers of arrays of one element, which numpy
2.4 refuses.
"""

from __future__ import annotations

import numpy as np
import torch


def mend() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(value, from_dtype, to_dtype, mode):
        if (from_dtype, to_dtype) != (tl.float32, tl.bfloat16):
            return convert(value, from_dtype, to_dtype, mode)
        # as bits or as numbers, the interpreter hands over both
        numbers = np.ascontiguousarray(value).view(np.float32)
        return torch.from_numpy(numbers.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(numbers.shape)

    interpreter._convert_float = rounding

    patch = interpreter._patch_lang_tensor

    def indexable(tensor, *scope):
        patch(tensor, *scope)
        change = scope[0].set_attr if scope else setattr
        change(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).item()))

    interpreter._patch_lang_tensor = indexable
