"""Names for places in the tuples that FSP's kernels take: Triton knows no names for parts of a tuple within
a tuple.
"""

from __future__ import annotations

import triton.language as tl

# of ``View.config`` in fsp/view.py, the constants of a feature: V[J][IS_FLAT]
IS_FLAT = tl.constexpr(0)  # positions have one stride
ROWS_INNER = tl.constexpr(1)  # channels are beside each other: channels_last
UNIT = tl.constexpr(2)  # a number that divides all offsets
WINDOW_D = tl.constexpr(3)  # numbers of the pooling window along depth, height and width
WINDOW_H = tl.constexpr(4)
WINDOW_W = tl.constexpr(5)
PARTS_D = tl.constexpr(6)  # pooled numbers at one position of a coarser grid, along each axis
PARTS_H = tl.constexpr(7)
PARTS_W = tl.constexpr(8)
IS_EXACT = tl.constexpr(9)  # bfloat16 holds what is read
IS_FAR = tl.constexpr(10)  # offsets within a sample need int64

# of ``View.numbers``: view[CHANNELS]
CHANNELS = tl.constexpr(0)
POSITIONS = tl.constexpr(1)  # of the grid
GRID_H = tl.constexpr(2)
GRID_W = tl.constexpr(3)
STRIDE_N = tl.constexpr(4)  # from one sample to the next
STRIDE_C = tl.constexpr(5)
STEP_D = tl.constexpr(6)  # from one position of the grid to the next
STEP_H = tl.constexpr(7)
STEP_W = tl.constexpr(8)
WITHIN_D = tl.constexpr(9)  # from one number of a window to the next
WITHIN_H = tl.constexpr(10)
WITHIN_W = tl.constexpr(11)
PART_D = tl.constexpr(12)  # from one pooled number of a position to the next
PART_H = tl.constexpr(13)
PART_W = tl.constexpr(14)

# of the constants of a tile: C[J][TILE_ROWS]
TILE_ROWS = tl.constexpr(0)
TILE_COLUMNS = tl.constexpr(1)
TILE_DEPTH = tl.constexpr(2)  # of what is multiplied at a time
# ... of a pair in the forward pass
KIND = tl.constexpr(3)  # 0: two products; 1: features are subtracted first; 2: fsp/low_rank.py
PART_CHANNELS = tl.constexpr(4)  # channels of a program, for KIND 2
FACTORS_ALONE = tl.constexpr(5)  # the columns' factors are saved in place of the matrix
ONE_TILE = tl.constexpr(5)  # for KIND 2: one square tile is all
# ... of a feature's gradient
FIRST_TERM = tl.constexpr(3)
COARSE_TERMS = tl.constexpr(4)  # on the grid of the products
FINE_TERMS = tl.constexpr(5)  # on the feature's own grid

# of a pair in the forward pass: pairs[J][FIRST_PROGRAM]
FIRST_PROGRAM = tl.constexpr(0)
PROGRAMS = tl.constexpr(1)  # of a sample
SHARES_AT = tl.constexpr(3)  # where its numbers of the loss are
SHARES = tl.constexpr(4)

# of a term of a gradient: K[T][TERM_KIND]
TERM_VIEW = tl.constexpr(0)  # the place of its first tensor and view
TERM_KIND = tl.constexpr(1)  # of a matrix saved (0), of squares (1), of a matrix recomputed (2)
TERM_LEFT = tl.constexpr(2)  # whether the gradient is that of the pair's first feature
TERM_SIGN = tl.constexpr(3)  # of squares: the sign of the second one, or 0 where there is none
TERM_SAME = tl.constexpr(3)  # of a matrix recomputed: student and teacher have one size
