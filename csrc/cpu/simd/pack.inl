// Brings blocks of feature maps into the form that gemm.inl multiplies: the accumulation type A, contiguous
// rows, padded with zeros to whole vectors. Also the fast average pooling of such blocks. Needs vec.inl and
// pool.inl.

constexpr int64_t kPad = 16;       // elements; a multiple of every vector length
constexpr int64_t kPanelPad = 32;  // a multiple of every panel of gemm.inl

// With so few rows of the left factor, at most two rows of tiles read the right one, which then is not worth
// packing.
constexpr int64_t kFewRows = 24;

// Some channels of one sample: element (c, s) of dtype `dtype` at data[c * stride_c + s * stride_s];
// positions of kGeneric blocks are read by size and stride.
struct Block {
  const void* data;
  DType dtype;
  Layout layout;
  int64_t stride_c, stride_s;
  int64_t size[3], stride[3];
};

static Block sample_block(const Feature& x, int64_t n, int64_t c) {
  const int64_t offset = (n * x.stride_n + c * x.stride_c) * size_of(x.dtype);
  return {static_cast<const char*>(x.data) + offset,
          x.dtype,
          x.layout,
          x.stride_c,
          x.stride_s,
          {x.size[0], x.size[1], x.size[2]},
          {x.stride[0], x.stride[1], x.stride[2]}};
}

// The block without its first c channels.
static Block channels_from(Block x, int64_t c) {
  x.data = static_cast<const char*>(x.data) + c * x.stride_c * size_of(x.dtype);
  return x;
}

// to[j][i] = from[i][j] for a square of one vector's lanes, less minus (rows of minus_row) if Minus.
template <bool Minus, typename A>
static void transpose_square(const A* from, int64_t from_row, A* to, int64_t to_row, const A* minus,
                             int64_t minus_row) {
  for (int64_t j = 0; j < kLanes<A>; ++j) {
    for (int64_t i = 0; i < kLanes<A>; ++i)
      to[j * to_row + i] = from[i * from_row + j] - (Minus ? minus[j * minus_row + i] : A(0));
  }
}

// Quarters of a vector are put together by loads, which leaves half of the shuffles of the usual scheme. Four
// (two) rows are read to the end before the next: rows 4 KiB apart, as those of 32x32 maps, compete for the
// same eight lines of the first-level cache.
template <bool Minus>
static void transpose_square(const float* from, int64_t from_row, float* to, int64_t to_row,
                             const float* minus, int64_t minus_row) {
  constexpr int kQuarters = FASTKD_VECTOR_BYTES / 16;
  VecF v[4][kQuarters];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 4
    for (int q = 0; q < kQuarters; ++q) {
      const float* p = from + i * from_row + 4 * q;
#if FASTKD_VECTOR_BYTES == 64
      __m512 x = _mm512_castps128_ps512(_mm_loadu_ps(p));
      x = _mm512_insertf32x4(x, _mm_loadu_ps(p + 4 * from_row), 1);
      x = _mm512_insertf32x4(x, _mm_loadu_ps(p + 8 * from_row), 2);
      v[i][q] = (VecF)_mm512_insertf32x4(x, _mm_loadu_ps(p + 12 * from_row), 3);
#elif FASTKD_VECTOR_BYTES == 32
      v[i][q] = (VecF)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)),
                                           _mm_loadu_ps(p + 4 * from_row), 1);
#else
      v[i][q] = load<float, float>(p);
#endif
    }
  }
#if FASTKD_VECTOR_BYTES == 64
  const IntF low = {0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29}, high = low + 2;
  const IntD low2 = {0, 8, 2, 10, 4, 12, 6, 14}, high2 = low2 + 1;
#elif FASTKD_VECTOR_BYTES == 32
  const IntF low = {0, 8, 1, 9, 4, 12, 5, 13}, high = low + 2;
  const IntD low2 = {0, 4, 2, 6}, high2 = low2 + 1;
#else
  const IntF low = {0, 4, 1, 5}, high = low + 2;
  const IntD low2 = {0, 2}, high2 = low2 + 1;
#endif
#pragma GCC unroll 4
  for (int q = 0; q < kQuarters; ++q) {
    const VecD a = (VecD)FASTKD_SHUFFLE(v[0][q], v[1][q], low),
               b = (VecD)FASTKD_SHUFFLE(v[2][q], v[3][q], low);
    const VecD c = (VecD)FASTKD_SHUFFLE(v[0][q], v[1][q], high),
               d = (VecD)FASTKD_SHUFFLE(v[2][q], v[3][q], high);
    const VecF out[4] = {(VecF)FASTKD_SHUFFLE(a, b, low2), (VecF)FASTKD_SHUFFLE(a, b, high2),
                         (VecF)FASTKD_SHUFFLE(c, d, low2), (VecF)FASTKD_SHUFFLE(c, d, high2)};
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const int64_t row = 4 * q + j;
      store<float, float>(to + row * to_row,
                          Minus ? out[j] - load<float, float>(minus + row * minus_row) : out[j]);
    }
  }
}

template <bool Minus, typename T, typename A>
static void transpose_block(const T* from, int64_t column, int64_t rows, int64_t columns, A* to,
                            int64_t to_row, const A* minus, int64_t minus_row) {
  // from[j * column + r] -> to[r * to_row + j]
  constexpr int64_t W = kLanes<A>;
  const int64_t whole_rows = rows / W * W, whole_columns = columns / W * W;
  for (int64_t j = 0; j < whole_columns; j += W) {
    for (int64_t r = 0; r < whole_rows; r += W) {
      const T* tile = from + j * column + r;
      A *target = to + r * to_row + j, converted[W * W];
      // Many rows a page apart are more streams than the hardware foresees; asking 512 bytes ahead saves a
      // sixth of a forward pass over large inputs.
      for (int64_t i = 0; i < W; ++i)
        __builtin_prefetch(reinterpret_cast<const char*>(tile + i * column) + 512, 0, 2);
      const A* less = Minus ? minus + r * minus_row + j : nullptr;
      if constexpr (sizeof(T) == sizeof(A)) {
        transpose_square<Minus>(tile, column, target, to_row, less, minus_row);
      } else {
        for (int64_t i = 0; i < W; ++i) store<A, A>(converted + i * W, load<T, A>(tile + i * column));
        transpose_square<Minus>(converted, W, target, to_row, less, minus_row);
      }
    }
  }
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t r = j < whole_columns ? whole_rows : 0; r < rows; ++r) {
      const A x = to_acc<T, A>(from[j * column + r]);
      to[r * to_row + j] = Minus ? x - minus[r * minus_row + j] : x;
    }
  }
}

// to[r * to_row + j] = from[r * row + j * column], less minus[r * minus_row + j] if Minus; rows are padded
// with zeros.
template <bool Minus, typename T, typename A>
static __attribute__((noinline)) void pack_rows(const T* from, int64_t row, int64_t column, int64_t rows,
                                                int64_t columns, A* to, int64_t to_row, const A* minus,
                                                int64_t minus_row) {
  if (column == 1) {
    for (int64_t r = 0; r < rows; ++r) {
      const T* p = from + r * row;
      A* q = to + r * to_row;
      int64_t j = 0;
      for (; j + kLanes<A> <= columns; j += kLanes<A>) {
        const Vec<A> x = load<T, A>(p + j);
        store<A, A>(q + j, Minus ? x - load<A, A>(minus + r * minus_row + j) : x);
      }
      for (; j < columns; ++j) q[j] = to_acc<T, A>(p[j]) - (Minus ? minus[r * minus_row + j] : A(0));
    }
  } else if (row == 1) {
    transpose_block<Minus, T, A>(from, column, rows, columns, to, to_row, minus, minus_row);
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < columns; ++j) {
        const A x = to_acc<T, A>(from[r * row + j * column]);
        to[r * to_row + j] = Minus ? x - minus[r * minus_row + j] : x;
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = columns; j < to_row; ++j) to[r * to_row + j] = 0;
  }
}

// f(position - begin, offset) for the positions [begin, end) of a block.
template <typename F>
FASTKD_INLINE void for_offsets(const Block& x, int64_t begin, int64_t end, const F& f) {
  int64_t w = begin % x.size[2], h = begin / x.size[2] % x.size[1], d = begin / (x.size[2] * x.size[1]);
  for (int64_t s = 0; s < end - begin; ++s) {
    f(s, d * x.stride[0] + h * x.stride[1] + w * x.stride[2]);
    if (++w < x.size[2]) continue;
    w = 0;
    if (++h < x.size[1]) continue;
    h = 0;
    ++d;
  }
}

// Positions [begin, end) of a block's channels: rows are positions (to[s][c]), less minus if Minus.
template <bool Minus, typename A>
static void pack_positions(const Block& x, int64_t begin, int64_t end, int64_t channels, A* to,
                           int64_t to_row, const A* minus, int64_t minus_row) {
  with_type<A>(x.dtype, [&](auto t) {
    using T = decltype(t);
    const T* from = static_cast<const T*>(x.data);
    if (x.layout != Layout::kGeneric) {
      return pack_rows<Minus, T, A>(from + begin * x.stride_s, x.stride_s, x.stride_c, end - begin, channels,
                                    to, to_row, minus, minus_row);
    }
    for_offsets(x, begin, end, [&](int64_t s, int64_t at) {
      pack_rows<Minus, T, A>(from + at, 0, x.stride_c, 1, channels, to + s * to_row, to_row,
                             Minus ? minus + s * minus_row : nullptr, minus_row);
    });
  });
}

// The same with channels as rows, in panels of kPanel<A> positions: to[s / kPanel][c][s % kPanel].
template <typename A>
static void pack_channels(const Block& x, int64_t begin, int64_t end, int64_t channels, A* to) {
  constexpr int64_t P = kPanel<A>;
  const int64_t panel = channels * P, count = end - begin, whole = count / P * P;
  with_type<A>(x.dtype, [&](auto t) {
    using T = decltype(t);
    const T* from = static_cast<const T*>(x.data);
    if (x.layout == Layout::kChannelsLast) {
      for (int64_t s = 0; s < count; s += P) {
        pack_rows<false, T, A>(from + (begin + s) * x.stride_s, x.stride_c, x.stride_s, channels,
                               min_of(P, count - s), to + s / P * panel, P, nullptr, 0);
      }
      return;
    }
    for (int64_t c = 0; c < channels; ++c, from += x.stride_c, to += P) {
      A* last = to + whole / P * panel;
      if (x.layout == Layout::kPlanes) {
        A* row = to;
        for (int64_t s = 0; s < whole; s += P, row += panel) {
          store<A, A>(row, load<T, A>(from + begin + s));
          store<A, A>(row + kLanes<A>, load<T, A>(from + begin + s + kLanes<A>));
        }
        convert_in<T, A>(from + begin + whole, count - whole, last);
      } else {
        for_offsets(x, begin, end,
                    [&](int64_t s, int64_t at) { to[s / P * panel + s % P] = to_acc<T, A>(from[at]); });
      }
      for (int64_t s = count - whole; whole < count && s < P; ++s) last[s] = 0;
    }
  });
}
