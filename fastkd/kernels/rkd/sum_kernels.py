"""RKD's kernel that adds up what the programs of another have found; `rkd/loss.py` says when."""

from __future__ import annotations

import triton
import triton.language as tl


# not specialized: a new batch size need not be a new kernel
@triton.jit(do_not_specialize=["first", "count", "wanted"])
def rkd_sums_kernel(scratch, first, count, wanted, BLOCK: tl.constexpr):
    """Up to four rows of ``count`` numbers, which follow each other from ``first`` on, are added up into the
    first four numbers there. ``wanted``: a bit for each row; the others may be anything.

    One program does all, in a fixed order: its results lie where its first row was.
    """
    row = tl.arange(0, 4)
    asked = ((wanted >> row) & 1) == 1
    rows = scratch + first
    total = tl.zeros((4, BLOCK), tl.float64)
    for begin in range(0, count, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        mask = asked[:, None] & (at < count)[None, :]
        total += tl.load(rows + row[:, None] * count + at[None, :], mask=mask, other=0)
    added = tl.sum(total, 1)
    tl.debug_barrier()  # all threads have read before one writes
    tl.store(rows + row, added, mask=asked)
