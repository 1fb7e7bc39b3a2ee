"""What Triton's interpreter gets wrong, mended for the tests.

It cuts float32 off where it writes bfloat16; a GPU rounds to nearest. It adds the rows of a tile one after
the other, a GPU's lanes add as a tree: errors would grow with the size of a tile. That of 3.6 makes numbers
of arrays of one element, which numpy 2.4 refuses. And it replaces the functions of triton.language again at
every call of a device function, a third of its time: here once a launch.
"""

from __future__ import annotations

import functools

import numpy as np
import torch


@functools.cache
def mend() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(value, from_dtype, to_dtype, mode):
        if (from_dtype, to_dtype) != (tl.float32, tl.bfloat16):
            return convert(value, from_dtype, to_dtype, mode)
        # as bits or as numbers, the interpreter hands over both
        numbers = np.ascontiguousarray(value).view(np.float32)
        return (
            torch.from_numpy(numbers.copy())
            .bfloat16()
            .view(torch.int16)
            .numpy()
            .view(np.uint16)
            .reshape(numbers.shape)
        )

    interpreter._convert_float = rounding

    def sum_as_tree(self, given):
        numbers = given.handle.data
        if numbers.dtype.kind != "f":
            return add_in_order(self, given)
        rows = np.moveaxis(numbers, self.axis, 0) if self.axis is not None else numbers.reshape(-1)
        while len(rows) > 1:  # sizes are powers of two
            rows = rows[: len(rows) // 2] + rows[len(rows) // 2 :]
        total = rows[0]
        if self.keep_dims:
            total = (
                np.expand_dims(total, self.axis)
                if self.axis is not None
                else total.reshape((1,) * numbers.ndim)
            )
        return self.to_tensor(total, given.dtype)

    add_in_order, interpreter.ReduceOps.sum = interpreter.ReduceOps.sum, sum_as_tree

    patch = interpreter._patch_lang_tensor

    def indexable(tensor, *scope):
        patch(tensor, *scope)
        change = scope[0].set_attr if scope else setattr
        change(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).item()))

    interpreter._patch_lang_tensor = indexable

    replace = interpreter._patch_lang
    seen: dict[int, tuple[bool, bool]] = {}  # by a function's globals: which of the two modules it sees
    replaced: set[tuple[bool, bool]] = set()  # in the launch that runs

    def once(fn):
        names = fn.__globals__
        if id(names) not in seen:
            seen[id(names)] = tuple(
                any(value is module for value in names.values()) for module in (tl, tl.core)
            )
        modules = seen[id(names)]
        if modules in replaced:
            return interpreter._LangPatchScope()
        scope, outermost = replace(fn), not replaced
        replaced.add(modules)
        if outermost:
            restore = scope.restore

            def ended():
                replaced.clear()
                restore()

            scope.restore = ended
        return scope

    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = once
    # likewise a table of types, made at every operation
    numpy_type = interpreter._get_np_dtype
    known = functools.cache(numpy_type)
    interpreter._get_np_dtype = lambda of: known(of.scalar) if type(of.scalar) is tl.dtype else numpy_type(of)
