// Products of planes: G = a b^T where the positions of every channel lie together. The lanes of a vector are
// positions, so nothing is transposed; each element of G is one vector of partial sums, added up at the end
// of a block of positions. Needs pack.inl.
//
// The left factor is copied into panels: for every vector of positions the kDotRows first rows, and for the
// difference form the same rows of the second factor, one after the other, so that a tile reads them in
// order, whatever the distance between the channels (4 KiB for 32x32 maps, which would compete for the same
// lines of the first-level cache). The right factor is read where it is, a few rows at a time, once for all
// panels: storing a copy would cost as much as half of the products.

// Rows and columns of a tile: its sums fill half of the registers and make whole vectors.
constexpr int kDotRows = kManyRegisters ? 8 : 4, kDotColumns = 2;

FASTKD_INLINE int64_t panel_elements(int64_t rows, int64_t depth, bool dual) {
  return round_up(rows, kDotRows) * depth * (dual ? 2 : 1);
}

// Vectors x and y of `Segment` lanes a sum -> one vector of half as many lanes a sum, those of x and y in
// turn. One order of lanes exchanges the halves that the other leaves where they are: half as many shuffles
// as for the upper and the lower halves.
template <int Segment, typename A>
FASTKD_INLINE Vec<A> fold(Vec<A> x, Vec<A> y) {
  constexpr int W = int(kLanes<A>), kHalf = Segment / 2;
  Mask<A> crossed = {}, straight = {};
  for (int i = 0; i < W; ++i) {
    const bool low = i % Segment < kHalf;
    crossed[i] = low ? i + kHalf : W + i - kHalf;
    straight[i] = low ? i : W + i;
  }
  return FASTKD_SHUFFLE(x, y, straight) + FASTKD_SHUFFLE(x, y, crossed);
}
// The sums of each of kLanes<A> vectors: every `Step`-th from v[0] on, of kLanes<A> / Step lanes each.
template <typename A, int Step>
FASTKD_INLINE Vec<A> fold_all(const Vec<A>* v) {
  if constexpr (Step == int(kLanes<A>)) {
    return v[0];
  } else {
    return fold<2 * Step, A>(fold_all<A, 2 * Step>(v), fold_all<A, 2 * Step>(v + Step));
  }
}

// to[i] = the sum of the lanes of v[i].
template <typename A, int Count>
FASTKD_INLINE void fold_sums(const Vec<A>* v, A* to) {
  constexpr int W = int(kLanes<A>);
  static_assert(Count % W == 0, "tiles fill whole vectors of sums");
#pragma GCC unroll 4
  for (int i = 0; i < Count; i += W) store<A, A>(to + i, fold_all<A, 1>(v + i));
}

// A row of the left factor, in a register: read once for all columns, where the compiler would rather read it
// with every product.
template <typename A>
FASTKD_INLINE Vec<A> load_left(const A* p) {
  Vec<A> v = load<A, A>(p);
#if FASTKD_VECTOR_BYTES >= 32
  asm("" : "+v"(v));
#endif
  return v;
}

// One tile: sums[i * kDotColumns + j] = or += over `vectors` vectors of positions. Dual: the first left
// factor with b, the second with b - b2. `columns_ahead`, if not 0: how far the next columns' rows are, which
// are asked for meanwhile.
template <typename A, bool Dual>
static void dot_tile(const A* a, const A* const* b, const A* const* b2, int64_t vectors, A* sums, bool add,
                     int64_t columns_ahead, Ahead* ahead) {
  constexpr int W = int(kLanes<A>), kCount = kDotRows * kDotColumns;
  const int64_t step = ahead ? ahead->step(kCount * W) : 0;
  const char* next = ahead ? ahead->at : reinterpret_cast<const char*>(a);
  const A *x0 = b[0], *x1 = b[1], *y0 = b2[0], *y1 = b2[1];
  Vec<A> sum[kCount];
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) sum[i] = Vec<A>{};
  for (int64_t v = 0; v < vectors * W; v += W) {
    __builtin_prefetch(next, 0, 2);
    next += step;
    const Vec<A> first[kDotColumns] = {load<A, A>(x0 + v), load<A, A>(x1 + v)};
#pragma GCC unroll 8
    for (int i = 0; i < kDotRows; ++i) {
      const Vec<A> left = load_left(a + i * W);
#pragma GCC unroll 2
      for (int j = 0; j < kDotColumns; ++j) sum[i * kDotColumns + j] += left * first[j];
    }
    a += kDotRows * W;
    if (columns_ahead) {
      __builtin_prefetch(x0 + v + columns_ahead, 0, 3);
      __builtin_prefetch(x1 + v + columns_ahead, 0, 3);
      if (Dual) __builtin_prefetch(y0 + v + columns_ahead, 0, 3);
      if (Dual) __builtin_prefetch(y1 + v + columns_ahead, 0, 3);
    }
    if (!Dual) continue;
    __builtin_prefetch(next, 0, 2);
    next += step;
    const Vec<A> change[kDotColumns] = {first[0] - load<A, A>(y0 + v), first[1] - load<A, A>(y1 + v)};
#pragma GCC unroll 8
    for (int i = 0; i < kDotRows; ++i) {
      const Vec<A> left = load_left(a + i * W);
#pragma GCC unroll 2
      for (int j = 0; j < kDotColumns; ++j) sum[i * kDotColumns + j] += left * change[j];
    }
    a += kDotRows * W;
  }
  if (ahead) ahead->moved(next);
  alignas(64) A total[kCount];
  fold_sums<A, kCount>(sum, total);
  for (int i = 0; i < kCount; ++i) sums[i] = add ? sums[i] + total[i] : total[i];
}

// Positions [begin, begin + count) of channel c of a block of planes as whole vectors of A: in place, or in
// `row`, padded with zeros.
template <typename A>
FASTKD_INLINE const A* plane_row(const Block& x, int64_t c, int64_t begin, int64_t count, A* row) {
  constexpr bool is_double = sizeof(A) == sizeof(double);
  if (x.layout == Layout::kPlanes && x.dtype == (is_double ? DType::kDouble : DType::kFloat) &&
      count % kLanes<A> == 0) {
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

// The panels of the left factor. One map: its values. Two: x - y and y.
template <typename A>
static void pack_panels(const Block& x, const Block* y, int64_t begin, int64_t count, int64_t rows, A* to,
                        A* row) {
  constexpr int W = int(kLanes<A>);
  const int64_t depth = round_up(count, W), chunk = (y ? 2 : 1) * kDotRows * W, size = depth / W * chunk;
  for (int64_t r = 0; r < round_up(rows, kDotRows); ++r) {
    A* p = to + r / kDotRows * size + r % kDotRows * W;
    if (r >= rows) {
      for (int64_t k = 0; k < depth; k += W, p += chunk) {
        store<A, A>(p, Vec<A>{});
        if (y) store<A, A>(p + kDotRows * W, Vec<A>{});
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
      const Vec<A> first = load<A, A>(from + k), second = load<A, A>(other + k);
      store<A, A>(p, first - second);
      store<A, A>(p + kDotRows * W, second);
    }
  }
}

// c = a b^T over all positions of one chain, or the difference of two (a[0] and a[1]) as multiply() in
// fsp/fsp.inl forms it. `sums` holds the tiles while they are added up, `row` four rows of `depth`.
template <typename A>
static void multiply_planes(const Block* a, const Block* b, bool difference, int64_t positions, int64_t depth,
                            int64_t rows, int64_t columns, A* panels, A* row, A* sums, A* c, Ahead* ahead) {
  constexpr int64_t kCount = kDotRows * kDotColumns;
  for (int64_t k = 0; k < positions; k += depth) {
    const int64_t count = min_of(depth, positions - k), whole = round_up(count, kLanes<A>);
    const int64_t size = whole * kDotRows * (difference ? 2 : 1);
    pack_panels<A>(a[0], difference ? a + 1 : nullptr, k, count, rows, panels, row);
    A* tile = sums;
    for (int64_t j = 0; j < columns; j += kDotColumns) {
      const A *first[kDotColumns], *second[kDotColumns];
      for (int64_t q = 0; q < kDotColumns; ++q) {
        const int64_t column = min_of(j + q, columns - 1);
        first[q] = plane_row<A>(b[0], column, k, count, row + 2 * q * whole);
        second[q] = difference ? plane_row<A>(b[1], column, k, count, row + (2 * q + 1) * whole) : first[q];
      }
      for (int64_t i = 0; i < rows; i += kDotRows, tile += kCount) {
        (difference ? dot_tile<A, true>
                    : dot_tile<A, false>)(panels + i / kDotRows * size, first, second, whole / kLanes<A>,
                                          tile, k > 0, i == 0 ? kDotColumns * b[0].stride_c : 0, ahead);
      }
    }
  }
  const A* tile = sums;
  for (int64_t j = 0; j < columns; j += kDotColumns) {
    for (int64_t i = 0; i < rows; i += kDotRows, tile += kCount) {
      const int64_t height = min_of(kDotRows, rows - i), width = min_of(kDotColumns, columns - j);
      for (int64_t r = 0; r < height; ++r) {
        for (int64_t q = 0; q < width; ++q) c[(i + r) * columns + j + q] = tile[r * kDotColumns + q];
      }
    }
  }
}
