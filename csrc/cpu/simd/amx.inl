// Products of bfloat16 matrices by AMX: one instruction multiplies 16 rows of 32 numbers by 32 rows of 16 and
// adds to 16 x 16 floats, more than ten times as fast as the multiply-adds of gemm.inl. Products are exact,
// sums are rounded to float, subnormal numbers count as zero. Only called where the CPU has AMX and the
// kernel lends its registers (tiles_available() in dispatch.cpp).

// Written out, since the compiler's intrinsics do not say which memory they read.
#define FASTKD_TILE_LOAD(tile, p, row) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(p), "r"(row) : "memory")
#define FASTKD_TILE_STORE(tile, p, row) \
  asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" : : "r"(p), "r"(row) : "memory")
#define FASTKD_TILE_ZERO(tile) asm volatile("tilezero %tmm" #tile)
#define FASTKD_TILE_PRODUCT(sum, a, b) asm volatile("tdpbf16ps %tmm" #b ", %tmm" #a ", %tmm" #sum)

constexpr int64_t kTile = 16;                      // rows of a tile, and columns of sums
constexpr int64_t kTileDepth = 32;                 // of the reduction, numbers a tile
constexpr int64_t kTileSize = kTile * kTileDepth;  // numbers
constexpr int kTileSteps = 4;

// C (m x n) = the sum over the steps of A_step B_step^T, plus D if there is one. Within a tile of the
// reduction the steps are added one after the other.
struct TileProduct {
  int64_t m, n, depth;  // depth: tiles of the reduction
  int steps;
  // Element (i, l) at a[i * a_row + l]; readable for whole tiles of rows, zero up to whole tiles of the
  // reduction.
  const uint16_t* a[kTileSteps];
  int64_t a_row[kTileSteps];
  // Element (l, j) at b[(j / 16 * depth + l / 32) * kTileSize + l % 32 / 2 * 32 + j % 16 * 2 + l % 2];
  // likewise.
  const uint16_t* b[kTileSteps];
  float* c;
  int64_t c_row;
  const float* d;  // or null
  int64_t d_row;
};

// All eight tiles are whole ones: less than that is padded.
static void begin_tiles() {
  struct alignas(64) {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } config = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
  asm volatile("ldtilecfg %0" : : "m"(config));
}
static void end_tiles() { asm volatile("tilerelease"); }

// M x N tiles of C from (i, j) on.
template <int M, int N>
static void multiply_tile_block(const TileProduct& p, int64_t i, int64_t j, const float* d, int64_t d_row,
                                float* c, int64_t c_row) {
  c_row *= 4, d_row *= 4;
  if (d) {
    FASTKD_TILE_LOAD(0, d, d_row);
    if (N > 1) FASTKD_TILE_LOAD(1, d + kTile, d_row);
    if (M > 1) FASTKD_TILE_LOAD(2, d + 4 * d_row, d_row);
    if (M > 1 && N > 1) FASTKD_TILE_LOAD(3, d + 4 * d_row + kTile, d_row);
  } else {
    FASTKD_TILE_ZERO(0);
    FASTKD_TILE_ZERO(1);
    FASTKD_TILE_ZERO(2);
    FASTKD_TILE_ZERO(3);
  }
  for (int64_t t = 0; t < p.depth; ++t) {
    for (int s = 0; s < p.steps; ++s) {
      const uint16_t* a = p.a[s] + i * p.a_row[s] + t * kTileDepth;
      const uint16_t* b = p.b[s] + (j / kTile * p.depth + t) * kTileSize;
      const int64_t row = 2 * p.a_row[s], b_row = 2 * kTileDepth;
      FASTKD_TILE_LOAD(4, a, row);
      FASTKD_TILE_LOAD(6, b, b_row);
      FASTKD_TILE_PRODUCT(0, 4, 6);
      if (N > 1) {
        FASTKD_TILE_LOAD(7, b + p.depth * kTileSize, b_row);
        FASTKD_TILE_PRODUCT(1, 4, 7);
      }
      if (M > 1) {
        FASTKD_TILE_LOAD(5, a + kTile * p.a_row[s], row);
        FASTKD_TILE_PRODUCT(2, 5, 6);
        if (N > 1) FASTKD_TILE_PRODUCT(3, 5, 7);
      }
    }
  }
  FASTKD_TILE_STORE(0, c, c_row);
  if (N > 1) FASTKD_TILE_STORE(1, c + kTile, c_row);
  if (M > 1) FASTKD_TILE_STORE(2, c + 4 * c_row, c_row);
  if (M > 1 && N > 1) FASTKD_TILE_STORE(3, c + 4 * c_row + kTile, c_row);
}

static void multiply_tiles(const TileProduct& p) {
  constexpr int64_t kBlock = 2 * kTile;
  alignas(64) float edge[kBlock * kBlock];
  for (int64_t j = 0; j < p.n; j += kBlock) {
    const int64_t columns = min_of(kBlock, p.n - j);
    for (int64_t i = 0; i < p.m; i += kBlock) {
      const int64_t rows = min_of(kBlock, p.m - i);
      const auto block = rows > kTile
                             ? (columns > kTile ? multiply_tile_block<2, 2> : multiply_tile_block<2, 1>)
                             : (columns > kTile ? multiply_tile_block<1, 2> : multiply_tile_block<1, 1>);
      const float* d = p.d ? p.d + i * p.d_row + j : nullptr;
      float* c = p.c + i * p.c_row + j;
      if (rows % kTile == 0 && columns % kTile == 0) {
        block(p, i, j, d, p.d_row, c, p.c_row);
        continue;
      }
      for (int64_t r = 0; d && r < rows; ++r)
        __builtin_memcpy(edge + r * kBlock, d + r * p.d_row, static_cast<size_t>(columns) * 4);
      block(p, i, j, d ? edge : nullptr, kBlock, edge, kBlock);
      for (int64_t r = 0; r < rows; ++r)
        __builtin_memcpy(c + r * p.c_row, edge + r * kBlock, static_cast<size_t>(columns) * 4);
    }
  }
}
