"""Triton's interpreter cuts float32 off where it writes bfloat16; here it rounds to nearest, as a GPU does."""

from __future__ import annotations

import numpy as np
import torch


def round_bfloat16() -> None:
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
