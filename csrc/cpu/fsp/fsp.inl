// FSP kernels: FSP matrices and their loss (here) and the gradients of the feature maps (fsp/backward.inl).
// What is multiplied is packed block by block into scratch memory (or read in place where it lies well), so
// layouts, dtypes and pooling end before the arithmetic begins, and no tensor is ever copied as a whole.
#include "cpu/simd/ahead.inl"
#include "cpu/simd/gemm.inl"
#include "cpu/simd/pack.inl"
#include "cpu/fsp/pool.inl"
#include "cpu/fsp/dot.inl"
#include "cpu/fsp/distance.inl"

// Hands out pieces of scratch memory; with a null base it only measures.
struct Arena {
  char* base;
  size_t used;
  template <typename A>
  A* take(int64_t count) {
    const size_t at = used;
    used += (static_cast<size_t>(count) * sizeof(A) + 63) / 64 * 64;
    return base ? reinterpret_cast<A*>(base + at) : nullptr;
  }
};

FASTKD_INLINE int64_t max_of(int64_t a, int64_t b) { return a < b ? b : a; }

#if defined(FASTKD_AMX) && FASTKD_VECTOR_BYTES == 64
#include "cpu/fsp/amx.inl"
#include "cpu/fsp/amx_backward.inl"
#else  // no plan asks for these
struct TileForward {};
struct TileBackward {};
FASTKD_INLINE TileForward tile_forward_of(const FspPair&, Arena&) { return {}; }
FASTKD_INLINE TileBackward tile_backward_of(const FspStage&, Arena&) { return {}; }
FASTKD_INLINE void multiply_forward_tiles(const FspPair&, int64_t, int64_t, int64_t, const TileForward&,
                                          float*) {}
FASTKD_INLINE void multiply_term_tiles(const FspTerm&, bool, int64_t, int64_t, int64_t, float*, float*,
                                       const TileBackward&, float*, int64_t, const float*, int64_t) {}
#endif

#include "cpu/fsp/low_rank.inl"

template <typename A>
struct ForwardScratch {
  A *pooled_a[2], *pooled_b[2], *plane;
  A *a[2], *b[2];  // one depth of positions of each operand
  A* row;          // of one channel of both maps, for planes
  A* g[2];         // rows of G: of the student or the difference, if `out` does not take them; of the teacher
  double* columns;
  TileForward tiles;
  LowRankScratch<A> low_rank;  // with its sums in a
  Ahead* ahead;
};

template <typename A>
static ForwardScratch<A> forward_scratch_of(const FspPair& pair, Arena& arena) {
  ForwardScratch<A> s = {};
  const int64_t cb = pair.b[0].x.channels;
  int64_t plane = 0;
  if (pair.result == FspResult::kColumnNorms) s.columns = arena.take<double>(cb);
  if (pair.tiles) {
    if (!pair.out) s.g[0] = arena.take<A>(pair.rows * cb);
    s.tiles = tile_forward_of(pair, arena);
    return s;
  }
  if (pair.low_rank) {
    const int64_t k = pair.positions[0];
    s.low_rank = low_rank_scratch_of<A>(pair.a, pair.b, pair.depth, k, arena);
    s.a[0] = arena.take<A>(2 * k * factors_row(k, 3));
    s.a[1] = arena.take<A>(2 * k * factors_row(k, 2));
    return s;
  }
  for (int32_t i = 0; i < pair.chains; ++i) {
    s.pooled_a[i] = arena.take<A>(pooled_elements(pair.a[i], pair.rows));
    s.pooled_b[i] = arena.take<A>(pooled_elements(pair.b[i], cb));
    plane = max_of(plane, max_of(plane_elements(pair.a[i]), plane_elements(pair.b[i])));
    if (!pair.planes) {
      s.a[i] = arena.take<A>(pair.depth * round_up(pair.rows, kPad));
      s.b[i] = arena.take<A>(pair.depth * round_up(cb, kPanelPad));
    }
    if (i == 0 ? pair.out == nullptr : !pair.fused) s.g[i] = arena.take<A>(pair.rows * cb);
  }
  if (pair.planes) {
    const int64_t depth = round_up(pair.depth, kPad);
    s.a[0] = arena.take<A>(panel_elements(pair.rows, depth, pair.fused));
    s.b[0] = arena.take<A>(round_up(pair.rows, kDotRows) * round_up(cb, kDotColumns));
    s.row = arena.take<A>(4 * depth);
  }
  s.plane = arena.take<A>(plane);
  return s;
}

// Whether gemm can read the block's rows of channels where they are.
template <typename A>
FASTKD_INLINE bool in_place(const Block& x) {
  return x.layout == Layout::kChannelsLast &&
         x.dtype == (sizeof(A) == sizeof(double) ? DType::kDouble : DType::kFloat);
}

// Positions [begin, end) as rows of channels, the left factor of gemm(): where they are, or packed into `to`.
template <typename A>
static const A* rows_of(const Block& x, int64_t begin, int64_t end, int64_t channels, A* to, int64_t* row) {
  if (in_place<A>(x)) {
    *row = x.stride_s;
    return static_cast<const A*>(x.data) + begin * x.stride_s;
  }
  *row = round_up(channels, kPad);
  pack_positions<false, A>(x, begin, end, channels, to, *row, nullptr, 0);
  return to;
}

// The same as the right factor: where they are, if they are read up to whole vectors and by few tiles, or
// packed in panels: rows a power of two apart would compete for the same lines of the first-level cache.
template <typename A>
static const A* columns_of(const Block& x, int64_t begin, int64_t end, int64_t channels, int64_t rows, A* to,
                           int64_t* row, int64_t* panel) {
  if (in_place<A>(x) && channels % kPad == 0 && rows <= kFewRows) {
    *row = x.stride_s, *panel = kPanel<A>;
    return static_cast<const A*>(x.data) + begin * x.stride_s;
  }
  *row = min_of(round_up(channels, kPad), kPanel<A>), *panel = (end - begin) * kPanel<A>;
  for (int64_t c = 0, p = 0; c < channels; c += kPanel<A>, p += *panel) {
    pack_positions<false, A>(channels_from(x, c), begin, end, min_of(kPanel<A>, channels - c), to + p, *row,
                             nullptr, 0);
  }
  return to;
}

// c = a b^T over all positions of one chain, or the difference of two chains as (A_s - A_t) B_s^T + A_t (B_s
// - B_t)^T: the difference of matrices that are alike keeps its digits when it is formed from differences of
// the maps.
template <typename A>
static void multiply(const Block* a, const Block* b, bool difference, int64_t positions, const FspPair& pair,
                     int64_t rows, ForwardScratch<A>& s, int chain, A* c) {
  const int64_t cb = pair.b[0].x.channels;
  if (pair.planes) {
    return multiply_planes<A>(a + chain, b + chain, difference, positions, pair.depth, rows, cb, s.a[0],
                              s.row, s.b[0], c, s.ahead);
  }
  for (int64_t k = 0; k < positions; k += pair.depth) {
    const int64_t end = min_of(k + pair.depth, positions);
    Gemm<A> g = {};
    g.m = rows, g.n = cb, g.k = end - k;
    g.a_row = 1, g.a_block = kGemmRows;
    g.ahead = s.ahead;
    g.c = c, g.c_row = cb;
    g.d = k > 0 ? c : nullptr, g.d_row = cb;
    if (difference) {
      g.a2 = rows_of<A>(a[1], k, end, rows, s.a[1], &g.a2_col);
      g.a_col = round_up(rows, kPad);
      pack_positions<true, A>(a[0], k, end, rows, s.a[0], g.a_col, g.a2, g.a2_col);
      g.a = s.a[0];
      g.b2 = columns_of<A>(b[1], k, end, cb, rows, s.b[1], &g.b2_row, &g.b2_panel);
    } else {
      g.a = rows_of<A>(a[chain], k, end, rows, s.a[0], &g.a_col);
    }
    g.b = columns_of<A>(b[chain], k, end, cb, rows, s.b[0], &g.b_row, &g.b_panel);
    gemm(g);
  }
}

// One sample's rows [i, i + rows) of G; returns their part of the loss.
template <typename A>
static double forward_unit(const FspPair& pair, int64_t n, int64_t i, void* scratch, Ahead* ahead) {
  Arena arena = {static_cast<char*>(scratch), 0};
  ForwardScratch<A> s = forward_scratch_of<A>(pair, arena);
  s.ahead = ahead;
  if (pair.low_rank) return forward_low_rank<A>(pair, n, s.low_rank, s.a);
  const int64_t ca = pair.a[0].x.channels, cb = pair.b[0].x.channels, rows = min_of(pair.rows, ca - i);
  A* c = pair.out ? static_cast<A*>(pair.out) + (n * ca + i) * cb : s.g[0];
  const A* other = pair.chains == 2 && !pair.fused ? s.g[1] : nullptr;
  int64_t parts = 1;  // of a position
  if (pair.tiles) {
    if constexpr (sizeof(A) == sizeof(float)) multiply_forward_tiles(pair, n, i, rows, s.tiles, c);
    parts = pair.a[0].pool.active ? 4 : 1;
  } else {
    Block a[2], b[2];
    for (int32_t t = 0; t < pair.chains; ++t) {
      a[t] = operand_block<A>(pair.a[t], n, i, rows, s.plane, s.pooled_a[t]);
      b[t] = operand_block<A>(pair.b[t], n, 0, cb, s.plane, s.pooled_b[t]);
    }
    multiply<A>(a, b, pair.fused, pair.positions[0], pair, rows, s, 0, c);
    if (other) multiply<A>(a, b, false, pair.positions[1], pair, rows, s, 1, s.g[1]);
  }
  const A positions = static_cast<A>(pair.positions[0] * parts),
          other_positions = static_cast<A>(pair.positions[1]);
  const A slope = static_cast<A>(pair.slope);
  if (pair.result == FspResult::kSquares)
    return squares<A>(c, rows * cb, positions, other, other_positions, slope);
  divide<A>(c, rows * cb, positions, other, other_positions);
  if (pair.result == FspResult::kMatrix) return 0;
  return column_norms<A>(c, rows, cb, slope, pair.out != nullptr, s.columns);
}

template <typename A>
static size_t forward_scratch(const FspForward& call) {
  size_t most = 0;
  for (int64_t p = 0; p < call.count; ++p) {
    Arena arena = {nullptr, 0};
    forward_scratch_of<A>(call.pairs[p], arena);
    most = arena.used > most ? arena.used : most;
  }
  return most;
}

// The maps of sample n in the order in which they are read. Those with gaps between their numbers are left
// out: what lies there would take the place of what is wanted.
static Ahead maps_ahead(const FspForward& call, int64_t n) {
  Ahead ahead = {};
  int64_t bytes = 0;
  for (int64_t i = 0; i <= call.count; ++i) {
    const FspPair& pair = call.pairs[min_of(i, call.count - 1)];
    for (int32_t t = 0; t < pair.chains; ++t) {
      const Feature& x = (i < call.count ? pair.a : pair.b)[t].x;
      const Block block = sample_block(x, n, 0);
      const int64_t size = 1 + (x.channels - 1) * x.stride_c + (x.positions - 1) * x.stride_s;
      if (x.layout == Layout::kGeneric || size > x.channels * x.positions) continue;
      const int64_t all = size * size_of(x.dtype);
      ahead.add(block.data, all);
      bytes += all;
    }
  }
  ahead.rate = (bytes << 16) / call.work_ahead;
  return ahead;
}

template <typename A>
static void forward(const FspForward& call, int64_t begin, int64_t end, void* scratch, Ahead* ahead) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const FspPair* pair = call.pairs;
    int64_t block = unit % call.units_per_sample;
    for (; block >= pair->row_blocks; ++pair) block -= pair->row_blocks;
    call.partial[unit] =
        forward_unit<A>(*pair, unit / call.units_per_sample, block * pair->rows, scratch, ahead);
  }
}

template <typename A>
static void forward(const FspForward& call, int64_t begin, int64_t end, void* scratch) {
  const int64_t units = call.units_per_sample;
  while (begin < end) {
    const int64_t n = begin / units, stop = min_of(end, (n + 1) * units);
    Ahead next = {};
    if (call.work_ahead > 0 && stop < end) next = maps_ahead(call, n + 1);
    forward<A>(call, begin, stop, scratch, next.count ? &next : nullptr);
    begin = stop;
  }
}

#include "cpu/fsp/backward.inl"

template <typename A>
static size_t training_scratch(const FspTraining& call) {
  const size_t forward = forward_scratch<A>(call.forward), backward = backward_scratch<A>(call.backward);
  return forward < backward ? backward : forward;
}

template <typename A>
static void training(const FspTraining& call, int64_t begin, int64_t end, void* scratch) {
  const int64_t units = call.forward.units_per_sample, stages = call.backward.units_per_sample;
  for (int64_t n = begin; n < end; ++n) {
    Ahead next = {};
    if (call.forward.work_ahead > 0 && n + 1 < end) next = maps_ahead(call.forward, n + 1);
    Ahead* ahead = next.count ? &next : nullptr;
    forward<A>(call.forward, n * units, (n + 1) * units, scratch, ahead);
    backward<A>(call.backward, n * stages, (n + 1) * stages, scratch, ahead);
  }
}

extern const FspKernels fsp_kernels = {
    {forward_scratch<float>, forward_scratch<double>},   {forward<float>, forward<double>},
    {backward_scratch<float>, backward_scratch<double>}, {backward<float>, backward<double>},
    {training_scratch<float>, training_scratch<double>}, {training<float>, training<double>},
};
