"""Names for places in the tuples that attention's kernels take: Triton knows no names for parts of a tuple
within a tuple.
"""

from __future__ import annotations

import triton.language as tl

# of ``launch.config``, the constants of a tensor: CONFIG[ITEM][IS_FLAT]
IS_FLAT = tl.constexpr(0)  # positions have one stride
ROWS_INNER = tl.constexpr(1)  # channels are beside each other: channels_last
UNIT = tl.constexpr(2)  # a number that divides all offsets
TILE_ROWS = tl.constexpr(3)
TILE_LENGTH = tl.constexpr(4)
# ... of the power p, ``launch.power``
WHOLE = tl.constexpr(5)  # p = WHOLE + HALF / 2 by multiplications; 0: by logarithms
HALF = tl.constexpr(6)
IS_SIGNED = tl.constexpr(7)
POWER = tl.constexpr(8)
PARITY = tl.constexpr(9)  # of x^p with x < 0: 1 negative, 2 positive, 0 none

# of ``MatrixView.numbers``: view[ROWS]
ROWS = tl.constexpr(0)
LENGTH = tl.constexpr(1)  # of a row
HEIGHT = tl.constexpr(2)
WIDTH = tl.constexpr(3)
SAMPLE_STRIDE = tl.constexpr(4)
ROW_STRIDE = tl.constexpr(5)
PLANE_STRIDE = tl.constexpr(6)
LINE_STRIDE = tl.constexpr(7)
POSITION_STRIDE = tl.constexpr(8)
