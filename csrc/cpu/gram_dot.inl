// Products of planes: G = a b^T where the positions of every channel lie together. The lanes of a vector are positions, so nothing is
// transposed; each element of G is one vector of partial sums, added up at the end of a block of positions. Needs pack.inl.
//
// The rows of a block are copied into panels: for every vector of positions the kDotRows first rows, and for the difference form the same
// rows of the second factor, one after the other. A tile then reads memory in order, whatever the distance between the channels (4 KiB for
// 32x32 maps, which would compete for the same lines of the first-level cache).

// Rows and columns of a tile: its vectors of sums fill half of the registers and are a multiple of the lanes.
constexpr int kDotRows = 4, kDotColumns = FASTKD_VECTOR_BYTES == 64 ? 4 : 2;

FASTKD_INLINE int64_t panel_elements(int64_t rows, int64_t height, int64_t depth, bool dual) {
  return round_up(rows, height) * depth * (dual ? 2 : 1);
}

#if FASTKD_VECTOR_BYTES >= 32
// Vectors x and y of `Segment` lanes a sum -> one vector of half as many lanes a sum, in the same order.
template <int Segment, typename A>
FASTKD_INLINE Vec<A> fold(Vec<A> x, Vec<A> y) {
  Mask<A> low = {};
  for (int i = 0; i < int(kLanes<A>); ++i) low[i] = i / (Segment / 2) * Segment + i % (Segment / 2);
  return __builtin_shuffle(x, y, low) + __builtin_shuffle(x, y, low + Segment / 2);
}
// The sums of each of kLanes<A> vectors.
template <typename A, int Count>
FASTKD_INLINE Vec<A> fold_all(const Vec<A>* v) {
  if constexpr (Count == 1) {
    return v[0];
  } else {
    Vec<A> half[Count / 2];
#pragma GCC unroll 8
    for (int i = 0; i < Count / 2; ++i) half[i] = fold<Count, A>(v[2 * i], v[2 * i + 1]);
    return fold_all<A, Count / 2>(half);
  }
}
#endif

// to[i] = the sum of the lanes of v[i].
template <typename A, int Count>
FASTKD_INLINE void fold_sums(const Vec<A>* v, A* to) {
  constexpr int W = int(kLanes<A>);
#if FASTKD_VECTOR_BYTES >= 32
  static_assert(Count % W == 0, "tiles fill whole vectors of sums");
#pragma GCC unroll 4
  for (int i = 0; i < Count; i += W) store<A, A>(to + i, fold_all<A, W>(v + i));
#else
  for (int i = 0; i < Count; ++i) {
    A lanes[W];
    store<A, A>(lanes, v[i]);
    for (int n = W / 2; n > 0; n /= 2)
      for (int j = 0; j < n; ++j) lanes[j] += lanes[j + n];
    to[i] = lanes[0];
  }
#endif
}

// One tile: sums[i * kDotColumns + j] over `vectors` vectors of positions. Dual: first a with first b, second a with second b.
template <typename A, bool Dual>
static void dot_tile(const A* a, const A* b, int64_t vectors, A* sums) {
  constexpr int W = int(kLanes<A>), kFactors = Dual ? 2 : 1;
  Vec<A> sum[kDotRows * kDotColumns];
#pragma GCC unroll 16
  for (int i = 0; i < kDotRows * kDotColumns; ++i) sum[i] = Vec<A>{};
  for (int64_t v = 0; v < vectors; ++v) {
#pragma GCC unroll 2
    for (int f = 0; f < kFactors; ++f) {
      Vec<A> right[kDotColumns];
#pragma GCC unroll 4
      for (int j = 0; j < kDotColumns; ++j) right[j] = load<A, A>(b + j * W);
#pragma GCC unroll 4
      for (int i = 0; i < kDotRows; ++i) {
        const Vec<A> left = load<A, A>(a + i * W);
#pragma GCC unroll 4
        for (int j = 0; j < kDotColumns; ++j) sum[i * kDotColumns + j] += left * right[j];
      }
      a += kDotRows * W;
      b += kDotColumns * W;
    }
  }
  fold_sums<A, kDotRows * kDotColumns>(sum, sums);
}

// Positions of a tile at a time: its panels stay in the first-level cache.
constexpr int64_t kDotDepth = 256;

// c (rows x columns) = or += the products of the panels a and b.
template <typename A, bool Dual>
static void dot_panels(const A* a, const A* b, int64_t rows, int64_t columns, int64_t depth, A* c, bool add) {
  constexpr int64_t kFactors = Dual ? 2 : 1;
  for (int64_t k = 0; k < depth; k += kDotDepth, add = true) {
    const int64_t vectors = min_of(kDotDepth, depth - k) / kLanes<A>;
    for (int64_t j = 0; j < columns; j += kDotColumns) {
      for (int64_t i = 0; i < rows; i += kDotRows) {
        alignas(64) A sums[kDotRows * kDotColumns];
        dot_tile<A, Dual>(a + (i * depth + k * kDotRows) * kFactors, b + (j * depth + k * kDotColumns) * kFactors, vectors, sums);
        const int64_t height = min_of(kDotRows, rows - i), width = min_of(kDotColumns, columns - j);
        for (int64_t r = 0; r < height; ++r) {
          for (int64_t q = 0; q < width; ++q) {
            A& to = c[(i + r) * columns + j + q];
            to = add ? to + sums[r * kDotColumns + q] : sums[r * kDotColumns + q];
          }
        }
      }
    }
  }
}

// Positions [begin, begin + count) of channel c of a block of planes as whole vectors of A: in place, or in `row`, padded with zeros.
template <typename A>
FASTKD_INLINE const A* plane_row(const Block& x, int64_t c, int64_t begin, int64_t count, A* row) {
  constexpr bool is_double = sizeof(A) == sizeof(double);
  if (x.layout == Layout::kPlanes && x.dtype == (is_double ? DType::kDouble : DType::kFloat) && count % kLanes<A> == 0) {
    return static_cast<const A*>(x.data) + c * x.stride_c + begin;
  }
  with_type<A>(x.dtype, [&](auto t) {
    using T = decltype(t);
    const T* from = static_cast<const T*>(x.data) + c * x.stride_c;
    if (x.layout == Layout::kPlanes) {
      convert_in<T, A>(from + begin, count, row);
    } else {
      for_offsets(x, begin, begin + count, [&](int64_t s, int64_t at) { row[s] = to_acc<T, A>(from[at]); });
    }
  });
  for (int64_t s = count; s < round_up(count, kLanes<A>); ++s) row[s] = 0;
  return row;
}

// The panels, Height rows each, of `rows` channels. One map: its values. Two: (x - y, y) of a left factor, (x, x - y) of a right one.
template <typename A, int Height, bool Left>
static void pack_panels(const Block& x, const Block* y, int64_t begin, int64_t count, int64_t rows, A* to, A* row) {
  constexpr int W = int(kLanes<A>);
  const int64_t depth = round_up(count, W), chunk = (y ? 2 : 1) * Height * W, size = depth / W * chunk;
  for (int64_t r = 0; r < round_up(rows, Height); ++r) {
    A* p = to + r / Height * size + r % Height * W;
    if (r >= rows) {
      for (int64_t k = 0; k < depth; k += W, p += chunk) {
        store<A, A>(p, Vec<A>{});
        if (y) store<A, A>(p + Height * W, Vec<A>{});
      }
      continue;
    }
    const A* from = plane_row<A>(x, r, begin, count, row);
    if (!y) {
      for (int64_t k = 0; k < depth; k += W, p += chunk) store<A, A>(p, load<A, A>(from + k));
      continue;
    }
    const A* other = plane_row<A>(*y, r, begin, count, row + depth);
    for (int64_t k = 0; k < depth; k += W, p += chunk) {
      const Vec<A> first = load<A, A>(from + k), second = load<A, A>(other + k), change = first - second;
      store<A, A>(p, Left ? change : first);
      store<A, A>(p + Height * W, Left ? second : change);
    }
  }
}

// c = a b^T over all positions of one chain, or the difference of two (a[0] and a[1]) as multiply() in gram.inl forms it.
template <typename A>
static void multiply_planes(const Block* a, const Block* b, bool difference, int64_t positions, int64_t depth, int64_t rows,
                            int64_t columns, A* left, A* right, A* row, A* c) {
  for (int64_t k = 0; k < positions; k += depth) {
    const int64_t count = min_of(depth, positions - k), whole = round_up(count, kLanes<A>);
    pack_panels<A, kDotRows, true>(a[0], difference ? a + 1 : nullptr, k, count, rows, left, row);
    pack_panels<A, kDotColumns, false>(b[0], difference ? b + 1 : nullptr, k, count, columns, right, row);
    (difference ? dot_panels<A, true> : dot_panels<A, false>)(left, right, rows, columns, whole, c, k > 0);
  }
}
