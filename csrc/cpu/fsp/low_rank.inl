// The loss of a pair of many channels and few positions K, and the student's gradients, from products over
// channels, K x K, in place of the matrix. K D = K (G_s - G_t) = X0 Y0^T + X1 Y1^T with X0 = A_s - A_t, X1 =
// A_t, Y0 = B_s, Y1 = B_s - B_t. So with X = [X0 X1] and Y = [Y0 Y1]
//
//   K^2 |D|^2 = <X^T X, Y^T Y>        K D B_s = X (Y^T B_s)        K D^T A_s = Y (X^T A_s)
//
// Every term holds a difference of features as often as the result does, made before anything is multiplied:
// near the teacher nothing is a difference of large numbers. Y^T B_s is a part of Y^T Y; X^T A_s, a sum of
// two parts of X^T X, which may cancel, is multiplied by itself. The teacher's gradients, Y^T B_t, would want
// as much: where they are asked for, the matrix serves.
//
// A loss that is small because both factors of it cancel, as where the student's A is c times the teacher's
// and its B 1 / c times, has the digits of |G|^2 alone: it is at least 0, and right to a rounding of |G|^2.
//
// Saved are the factors Y^T B_s and X^T A_s, 2 K x K each, times slope / K. Needs fsp/fsp.inl up to where
// that includes this file.

// x = slope * x.
template <typename A>
static void scale(A* x, int64_t count, A slope) {
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) store<A, A>(x + i, load<A, A>(x + i) * slope);
  for (; i < count; ++i) x[i] *= slope;
}

// Rows of a product that is symmetric: what lies left of a block of them is not computed.
constexpr int64_t kSquareRows = 48;

// A row of factors: X0, X1, or Y0, Y1; and, of A, its student's own numbers. Then zeros.
FASTKD_INLINE int64_t factors_row(int64_t positions, int64_t parts) {
  return round_up(parts * positions, kPad);
}

template <typename A>
struct LowRankScratch {
  A *pooled[2], *plane;  // of student and teacher, as operand_block() fills them
  A* dense[2];           // the maps as planes of A
  A* factors;            // X or Y of some channels
};

// For `channels` at a time of the operands of a and b, student and teacher each.
template <typename A>
static LowRankScratch<A> low_rank_scratch_of(const FspOperand* a, const FspOperand* b, int64_t channels,
                                             int64_t positions, Arena& arena) {
  LowRankScratch<A> s = {};
  int64_t plane = 0;
  for (int t = 0; t < 2; ++t) {
    s.pooled[t] = arena.take<A>(max_of(pooled_elements(a[t], channels), pooled_elements(b[t], channels)));
    s.dense[t] = arena.take<A>(channels * round_up(positions, kPad));
    plane = max_of(plane, max_of(plane_elements(a[t]), plane_elements(b[t])));
  }
  s.plane = arena.take<A>(plane);
  // as rows of either kind
  s.factors = arena.take<A>(
      max_of(channels * factors_row(positions, 3), 2 * positions * (round_up(channels, kPad) + kPad)));
  return s;
}

// The channels [c, c + channels) as planes of A, `row` numbers apart: where they are, or in `to`.
template <typename A>
static const A* planes_of(const Feature& x, const Block& block, int64_t n, int64_t c, int64_t channels,
                          int64_t positions, A* to, int64_t* row) {
  const DType same = sizeof(A) == sizeof(double) ? DType::kDouble : DType::kFloat;
  if (block.layout == Layout::kPlanes && block.dtype == same) {
    *row = block.stride_c;
    return static_cast<const A*>(block.data);
  }
  if (block.layout == Layout::kChannelsLast) {
    *row = round_up(positions, kPad);
    with_type<A>(block.dtype, [&](auto t) {
      using T = decltype(t);
      pack_rows<false, T, A>(static_cast<const T*>(block.data), block.stride_c, block.stride_s, channels,
                             positions, to, *row, nullptr, 0);
    });
    return to;
  }
  *row = positions;
  load_planes<A>(x, n, c, c + channels, to);
  return to;
}

// The factors of channels [c, c + channels), a row each, of B if right, else of A.
template <typename A>
static void pack_factors(const FspOperand* both, bool right, int64_t parts, int64_t n, int64_t c,
                         int64_t channels, int64_t positions, const LowRankScratch<A>& s) {
  const A* from[2];
  int64_t row[2];
  for (int t = 0; t < 2; ++t) {
    const Block block = operand_block<A>(both[t], n, c, channels, s.plane, s.pooled[t]);
    from[t] = planes_of<A>(both[t].x, block, n, c, channels, positions, s.dense[t], &row[t]);
  }
  const int64_t to_row = factors_row(positions, parts);
  for (int64_t i = 0; i < channels; ++i) {
    const A *x = from[0] + i * row[0], *y = from[1] + i * row[1];
    A *to = s.factors + i * to_row, *changes = right ? to + positions : to,
      *same = right ? to : to + positions;
    const A* kept = right ? x : y;
    int64_t j = 0;
    for (; j + kLanes<A> <= positions; j += kLanes<A>) {
      store<A, A>(changes + j, load<A, A>(x + j) - load<A, A>(y + j));
      store<A, A>(same + j, load<A, A>(kept + j));
    }
    for (; j < positions; ++j) changes[j] = x[j] - y[j], same[j] = kept[j];
    if (parts == 3) __builtin_memcpy(to + 2 * positions, x, static_cast<size_t>(positions) * sizeof(A));
    for (j = parts * positions; j < to_row; ++j) to[j] = 0;
  }
}

// sums (2 K rows) = the products of the first two parts of the factors and all of them, over all channels, on
// and right of the blocks on the diagonal.
template <typename A>
static void multiply_factors(const FspOperand* both, bool right, int64_t n, int64_t positions, int64_t depth,
                             const LowRankScratch<A>& s, A* sums) {
  const int64_t channels = both[0].x.channels, parts = right ? 2 : 3, row = factors_row(positions, parts);
  for (int64_t c = 0; c < channels; c += depth) {
    const int64_t count = min_of(depth, channels - c);
    pack_factors<A>(both, right, parts, n, c, count, positions, s);
    for (int64_t i = 0; i < 2 * positions; i += kSquareRows) {
      Gemm<A> g = {};
      g.m = min_of(kSquareRows, 2 * positions - i), g.n = parts * positions - i, g.k = count;
      g.a = s.factors + i, g.a_row = 1, g.a_col = row, g.a_block = kGemmRows;
      g.b = s.factors + i, g.b_row = row, g.b_panel = kPanel<A>;
      g.c = sums + i * row + i, g.c_row = row;
      g.d = c > 0 ? g.c : nullptr, g.d_row = row;
      gemm(g);
    }
  }
}

// <x, y> of two rows.
template <typename A>
static double inner_product(const A* x, const A* y, int64_t count) {
  constexpr int64_t D = kLanes<double>;
  VecD total[2] = {};
  int64_t i = 0;
  for (; i + 2 * D <= count; i += 2 * D) {
#pragma GCC unroll 2
    for (int64_t v = 0; v < 2; ++v)
      total[v] += load<A, double>(x + i + v * D) * load<A, double>(y + i + v * D);
  }
  double rest = sum(total[0]) + sum(total[1]);
  for (; i < count; ++i) rest += static_cast<double>(x[i]) * static_cast<double>(y[i]);
  return rest;
}

// Columns [0, K) of a symmetric product of which multiply_factors() made a part.
template <typename A>
static void first_columns(const A* sums, int64_t row, int64_t positions, A* to) {
  for (int64_t i = 0; i < 2 * positions; ++i, to += positions) {
    const int64_t known = min_of(i / kSquareRows * kSquareRows, positions);
    for (int64_t j = 0; j < known; ++j) to[j] = sums[j * row + i];
    for (int64_t j = known; j < positions; ++j) to[j] = sums[i * row + j];
  }
}

// One sample: its part of the loss, and if it is wanted what is saved. `sums`: for A and for B.
template <typename A>
static double forward_low_rank(const FspPair& pair, int64_t n, const LowRankScratch<A>& s, A* const* sums) {
  const int64_t k = pair.positions[0], a_row = factors_row(k, 3), b_row = factors_row(k, 2);
  multiply_factors<A>(pair.a, false, n, k, pair.depth, s, sums[0]);
  multiply_factors<A>(pair.b, true, n, k, pair.depth, s, sums[1]);
  double total = 0;
  for (int64_t i = 0; i < 2 * k; ++i) {
    const A *x = sums[0] + i * a_row + i, *y = sums[1] + i * b_row + i;
    total +=
        static_cast<double>(*x) * static_cast<double>(*y) + 2 * inner_product<A>(x + 1, y + 1, 2 * k - i - 1);
  }
  if (pair.out) {
    A* to = static_cast<A*>(pair.out) + n * kLowRankSquares * k * k;
    first_columns<A>(sums[1], b_row, k, to);
    for (int64_t i = 0; i < 2 * k; ++i)
      __builtin_memcpy(to + (2 * k + i) * k, sums[0] + i * a_row + 2 * k, static_cast<size_t>(k) * sizeof(A));
    scale<A>(to, kLowRankSquares * k * k, static_cast<A>(pair.slope / static_cast<double>(k)));
  }
  return total < 0 ? 0 : total / (static_cast<double>(k) * static_cast<double>(k));  // NaN stays
}

// As multiply_term() in fsp/backward.inl, for a term from what is saved.
template <typename A>
static void multiply_term_low_rank(const FspTerm& term, bool channels_last, int64_t n, int64_t c,
                                   int64_t channels, const LowRankScratch<A>& s, A* coefficients, A* to,
                                   int64_t to_row, const A* sum, int64_t sum_row, bool stream) {
  const int64_t k = term.positions, row = round_up(k, kPad);
  const A* saved = static_cast<const A*>(term.m) + n * term.m_n + (term.right ? 2 * k * k : 0);
  for (int64_t i = 0; i < 2 * k; ++i) {
    for (int64_t j = 0; j < row; ++j)
      coefficients[i * row + j] = j < k ? saved[i * k + j] * static_cast<A>(term.scale) : A(0);
  }
  Gemm<A> g = {};
  g.k = 2 * k;
  g.c = to, g.c_row = to_row;
  g.d = sum, g.d_row = sum_row;
  g.stream = stream;
  if (!channels_last) {
    pack_factors<A>(term.own_chains, term.right != 0, 2, n, c, channels, k, s);
    g.m = channels, g.n = k;
    g.a = s.factors, g.a_row = factors_row(k, 2), g.a_col = 1, g.a_block = kGemmRows * g.a_row;
    g.b = coefficients, g.b_row = row, g.b_panel = kPanel<A>;
    return gemm(g);
  }
  // not a power of two apart, at which rows would compete for the same lines of the first-level cache
  const int64_t width = round_up(channels, kPad) + kPad;
  Block block[2];
  for (int t = 0; t < 2; ++t)
    block[t] = operand_block<A>(term.own_chains[t], n, c, channels, s.plane, s.pooled[t]);
  A *first = s.factors, *second = first + k * width;
  if (term.right) {
    pack_positions<false, A>(block[0], 0, k, channels, first, width, nullptr, 0);
    pack_positions<false, A>(block[1], 0, k, channels, second, width, nullptr, 0);
    for (int64_t i = 0; i < k * width; i += kLanes<A>)
      store<A, A>(second + i, load<A, A>(first + i) - load<A, A>(second + i));
  } else {
    pack_positions<false, A>(block[1], 0, k, channels, second, width, nullptr, 0);
    pack_positions<true, A>(block[0], 0, k, channels, first, width, second, width);
  }
  g.m = k, g.n = channels;
  g.a = coefficients, g.a_row = 1, g.a_col = row, g.a_block = kGemmRows;
  g.b = first, g.b_row = width, g.b_panel = kPanel<A>;
  gemm(g);
}
