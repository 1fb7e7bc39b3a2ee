// A small matrix product, C (m x n) = A B, or D + A B, or with A2 (B - B2) added to either in the same sweep,
// for operands that already lie well: C has contiguous rows, B has them too or is cut into panels of a tile's
// width, and A is read one broadcast scalar at a time, through any strides. Everything the FSP kernels
// multiply is brought into this form (pack.inl), so one register tile serves every layout, direction and
// dtype.

// Columns of a tile, and of a panel of B.
template <typename T>
constexpr int64_t kPanel = 2 * kLanes<T>;

// Rows of a block of A, which stays in the second-level cache while a panel of B (kGemmDepth x kPanel) stays
// in the first-level cache.
constexpr int64_t kGemmRows = 96;

template <typename T>
struct Gemm {
  int64_t m, n, k;
  const T* a;  // element (i, l) at a[i / kGemmRows * a_block + i % kGemmRows * a_row + l * a_col]
  int64_t a_row, a_col, a_block;
  // element (l, j) at b[j / kPanel * b_panel + l * b_row + j % kPanel]; readable up to the next multiple of
  // the vector length in j
  const T* b;
  int64_t b_row, b_panel;
  const T* a2;  // the second product of the difference form (element (i, l) at a2[i + l * a2_col]); else null
  int64_t a2_col;
  const T* b2;
  int64_t b2_row, b2_panel;
  T* c;
  int64_t c_row;
  const T* d;  // added to the product (where it is C itself, C += A B); else null
  int64_t d_row;
  bool stream;   // C is written past the caches; its rows are aligned to vectors and n is a multiple of their
                 // length, k at most kGemmDepth
  Ahead* ahead;  // or null
};

// Rows of the register tile: enough independent sums to hide the latency of a multiply-add, few enough for
// the register file. A tile one vector wide needs more rows. double is not tuned: it keeps the code small.
template <typename T, int NV>
constexpr int kTileRows = sizeof(T) == 8              ? 8 / NV
                          : NV == 1                   ? (kManyRegisters ? 16 : 8)
                          : kManyRegisters            ? 12
                          : FASTKD_VECTOR_BYTES == 32 ? 6
                                                      : 4;

// A number of the left factor. On NEON it is read by an instruction of its own: GCC would read a whole column
// of them first, and keep sums in memory for want of registers.
FASTKD_INLINE double left_number(const double* p) { return *p; }
FASTKD_INLINE float left_number(const float* p) {
#ifdef FASTKD_NEON
  float x;
  asm volatile("ldr %s0, %1" : "=w"(x) : "m"(*p));
  return x;
#else
  return *p;
#endif
}

// One tile of MR x NV vectors over l in [0, k). `columns` is how many of its columns exist in C.
template <typename T, int MR, int NV, bool Dual, bool UnitRow>
static void gemm_tile(const Gemm<T>& g, const T* a, const T* a2, const T* b, const T* b2, const T* d,
                      int64_t d_row, T* c, int64_t k, int64_t columns) {
  using V = Vec<T>;
  constexpr int W = int(kLanes<T>);
  const int64_t a_row = UnitRow ? 1 : g.a_row, a_col = UnitRow ? g.a_col : 1;
  const int64_t step = g.ahead ? g.ahead->step(MR * NV * W) : 0;
  const char* next = g.ahead ? g.ahead->at : reinterpret_cast<const char*>(b);
  V sum[MR][NV];
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) sum[r][v] = V{};
  for (int64_t l = 0; l < k; ++l) {
    __builtin_prefetch(next, 0, 2);
    next += step;
    if (Dual) {
      __builtin_prefetch(next, 0, 2);
      next += step;
    }
    V right[NV], change[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      right[v] = load<T, T>(b + v * W);
      if (Dual) change[v] = right[v] - load<T, T>(b2 + v * W);
    }
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const T left = left_number(a + r * a_row);
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) sum[r][v] += left * right[v];
      if (Dual) {
        const T left2 = left_number(a2 + r);
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) sum[r][v] += left2 * change[v];
      }
    }
    a += a_col;
    b += g.b_row;
    if (Dual) {
      a2 += g.a2_col;
      b2 += g.b2_row;
    }
  }
  if (g.ahead) g.ahead->moved(next);
  if (columns == NV * W) {
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) {
        if (d) sum[r][v] += load<T, T>(d + r * d_row + v * W);
        T* to = c + r * g.c_row + v * W;
        g.stream ? stream<T, T>(to, sum[r][v]) : store<T, T>(to, sum[r][v]);
      }
    return;
  }
  // Unrolled like the loops above: a sum that is asked for by a variable index would live in memory.
  T rest[MR * NV * W];
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) store<T, T>(rest + (r * NV + v) * W, sum[r][v]);
  for (int r = 0; r < MR; ++r) {
    const T* from = rest + r * NV * W;
    for (int64_t j = 0; j < columns; ++j) c[r * g.c_row + j] = d ? d[r * d_row + j] + from[j] : from[j];
  }
}

template <typename T, int NV, bool Dual, bool UnitRow, int MR = kTileRows<T, NV>>
static void gemm_rows(int rows, const Gemm<T>& g, const T* a, const T* a2, const T* b, const T* b2,
                      const T* d, int64_t d_row, T* c, int64_t k, int64_t columns) {
  if constexpr (MR >= 1) {
    if (rows == MR) return gemm_tile<T, MR, NV, Dual, UnitRow>(g, a, a2, b, b2, d, d_row, c, k, columns);
    return gemm_rows<T, NV, Dual, UnitRow, MR - 1>(rows, g, a, a2, b, b2, d, d_row, c, k, columns);
  }
}

// Rows are shared out evenly over the tiles (17 rows as 5 + 6 + 6, not 8 + 8 + 1): no tile is left too thin
// to hide latency.
template <typename T, int NV, bool Dual, bool UnitRow>
static void gemm_column(const Gemm<T>& g, int64_t i0, int64_t i1, int64_t j, int64_t l, int64_t k) {
  const int64_t tiles = (i1 - i0 + kTileRows<T, NV> - 1) / kTileRows<T, NV>;
  int64_t i = i0;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t rows = (i1 - i) / (tiles - t),
                  columns = g.n - j < NV * kLanes<T> ? g.n - j : NV * kLanes<T>;
    const T *a = g.a + i0 / kGemmRows * g.a_block + (i - i0) * g.a_row + l * g.a_col,
            *b = g.b + j / kPanel<T> * g.b_panel + l * g.b_row;
    const T* a2 = Dual ? g.a2 + i + l * g.a2_col : nullptr;
    const T* b2 = Dual ? g.b2 + j / kPanel<T> * g.b2_panel + l * g.b2_row : nullptr;
    T* c = g.c + i * g.c_row + j;
    const int64_t d_row = l > 0 ? g.c_row : g.d_row;
    const T* d = l > 0 ? c : g.d ? g.d + i * d_row + j : nullptr;
    gemm_rows<T, NV, Dual, UnitRow>(int(rows), g, a, a2, b, b2, d, d_row, c, k, columns);
    i += rows;
  }
}

template <typename T, bool Dual, bool UnitRow>
static void gemm_blocks(const Gemm<T>& g) {
  constexpr int64_t W = kLanes<T>;
  for (int64_t l = 0; l < g.k; l += kGemmDepth) {
    const int64_t k = g.k - l < kGemmDepth ? g.k - l : kGemmDepth;
    for (int64_t i = 0; i < g.m; i += kGemmRows) {
      const int64_t end = g.m - i < kGemmRows ? g.m : i + kGemmRows;
      int64_t j = 0;
      for (; g.n - j > W; j += 2 * W) gemm_column<T, 2, Dual, UnitRow>(g, i, end, j, l, k);
      if (j < g.n) gemm_column<T, 1, Dual, UnitRow>(g, i, end, j, l, k);
    }
  }
}

// UnitRow: A's rows are adjacent (a_row == 1, packed by l); otherwise A's columns are (a_col == 1).
template <typename T>
static void gemm(const Gemm<T>& g) {
  if (g.a2) return gemm_blocks<T, true, true>(g);
  if (g.a_row == 1) return gemm_blocks<T, false, true>(g);
  gemm_blocks<T, false, false>(g);
}
