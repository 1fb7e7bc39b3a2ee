// FSP kernels: the gradients of the feature maps, from those of the FSP matrices. Needs fsp/fsp.inl up to
// where that includes this file.

template <typename A>
struct BackwardScratch {
  A* grad;    // the block's gradient, if it is not computed in place
  A* pooled;  // a term's gradient, before it is un-pooled
  A* plane;   // one plane, for pooling
  A* other;   // the other map, pooled
  A* rows;    // one depth of its positions
  A* m;       // the gradient of G
  int64_t grad_row, pooled_row, m_row;
  TileBackward tiles;
  LowRankScratch<A> low_rank[2];  // a term
  Ahead* ahead;
};

template <typename A>
static BackwardScratch<A> backward_scratch_of(const FspStage& stage, Arena& arena) {
  BackwardScratch<A> s = {};
  const int64_t padded = round_up(stage.channels, kPanelPad);
  int64_t pooled = 0, plane = 0, other = 0, rows = 0, m = 0;
  for (int32_t t = 0; t < stage.terms; ++t) {
    const FspTerm& term = stage.term[t];
    const int64_t co = term.other.x.channels, depth = round_up(term.depth, kPanelPad);
    if (term.own.active) {
      pooled = max_of(pooled, padded * term.positions);
      plane = max_of(plane, term.own.in_positions);
    }
    other = max_of(other, pooled_elements(term.other, co));
    plane = max_of(plane, plane_elements(term.other));
    if (term.low_rank) m = max_of(m, 2 * term.positions * round_up(term.positions, kPad));
    if (term.tiles || term.low_rank) continue;
    rows = max_of(rows, stage.channels_last ? depth * round_up(co, kPad) : co * depth);
    m = max_of(m, co * (padded + kGemmRows));
  }
  if (!stage.direct || (stage.stream && stage.terms > 1))
    s.grad = arena.take<A>(padded * (stage.x.positions + kPad));
  s.pooled = arena.take<A>(pooled);
  s.plane = arena.take<A>(plane);
  s.other = arena.take<A>(other);
  s.rows = arena.take<A>(rows);
  s.m = arena.take<A>(m);
  s.tiles = tile_backward_of(stage, arena);
  for (int32_t t = 0; t < stage.terms; ++t) {
    const FspTerm& term = stage.term[t];
    if (!term.low_rank) continue;
    s.low_rank[t] =
        low_rank_scratch_of<A>(term.own_chains, term.own_chains, stage.channels, term.positions, arena);
  }
  return s;
}

// to = scale * sum over o of m[c][o] other[o][position], plus `sum` if there is one, for `channels` channels
// from c on; to[c][position], or to[position][c] if channels_last.
template <typename A>
static void multiply_term(const FspStage& stage, int32_t t, int64_t n, int64_t c, int64_t channels,
                          BackwardScratch<A>& s, A* to, int64_t to_row, const A* sum, int64_t sum_row,
                          bool stream) {
  const FspTerm& term = stage.term[t];
  const bool channels_last = stage.channels_last != 0;
  if (term.low_rank) {
    return multiply_term_low_rank<A>(term, channels_last, n, c, channels, s.low_rank[t], s.m, to, to_row, sum,
                                     sum_row, stream);
  }
  if constexpr (sizeof(A) == sizeof(float)) {
    if (term.tiles) {
      return multiply_term_tiles(term, channels_last, n, c, channels, s.plane, s.other, s.tiles, to, to_row,
                                 sum, sum_row);
    }
  }
  const int64_t co = term.other.x.channels, width = channels_last ? kPanel<A> : kGemmRows;
  const int64_t row = min_of(round_up(channels, kPad), width), panel = co * row;
  int64_t used = 0;
  for (int64_t i = 0; i < channels; i += width, used += panel) {
    const int64_t at = n * term.m_n + (c + i) * term.m_c, count = min_of(width, channels - i);
    if (sizeof(A) == sizeof(float) || term.m_dtype == DType::kFloat) {
      pack_rows<false, float, A>(static_cast<const float*>(term.m) + at, term.m_o, term.m_c, co, count,
                                 s.m + used, row, nullptr, 0);
    } else {
      pack_rows<false, A, A>(static_cast<const A*>(term.m) + at, term.m_o, term.m_c, co, count, s.m + used,
                             row, nullptr, 0);
    }
  }
  scale<A>(s.m, used, static_cast<A>(term.scale));
  const Block other = operand_block<A>(term.other, n, 0, co, s.plane, s.other);
  const bool same_type = other.dtype == (sizeof(A) == sizeof(double) ? DType::kDouble : DType::kFloat);
  for (int64_t k = 0; k < term.positions; k += term.depth) {
    const int64_t count = min_of(term.depth, term.positions - k);
    Gemm<A> g = {};
    g.k = co;
    g.c_row = to_row;
    g.d_row = sum_row;
    g.stream = stream;
    g.ahead = s.ahead;
    if (channels_last) {
      g.m = count, g.n = channels;
      g.a = rows_of<A>(other, k, k + count, co, s.rows, &g.a_row);
      g.a_col = 1, g.a_block = kGemmRows * g.a_row;
      g.b = s.m, g.b_row = row, g.b_panel = panel;
      g.c = to + k * to_row;
      if (sum) g.d = sum + k * sum_row;
    } else {
      g.m = channels, g.n = count;
      g.a = s.m;
      g.a_row = 1, g.a_col = row, g.a_block = panel;
      g.c = to + k;
      if (sum) g.d = sum + k;
      const bool spread = term.other.pool.active && other.stride_c != term.positions;
      if (same_type && other.layout == Layout::kPlanes && count % kPad == 0 &&
          (channels <= kFewRows || spread)) {
        g.b = static_cast<const A*>(other.data) + k;
        g.b_row = other.stride_c, g.b_panel = kPanel<A>;
      } else {
        pack_channels<A>(other, k, k + count, co, s.rows);
        g.b = s.rows;
        g.b_row = kPanel<A>, g.b_panel = co * kPanel<A>;
      }
    }
    gemm(g);
  }
}

// The distance of planes in scratch memory: not 4 KiB, at which they would compete for the same lines of the
// first-level cache.
FASTKD_INLINE int64_t planes_row(const Feature& out) {
  return out.layout == Layout::kPlanes ? out.positions + kPad : out.positions;
}

// One sample's gradient of the stage's channels from c on.
template <typename A>
static void backward_unit(const FspStage& stage, int64_t n, int64_t c, void* scratch, Ahead* ahead) {
  Arena arena = {static_cast<char*>(scratch), 0};
  BackwardScratch<A> s = backward_scratch_of<A>(stage, arena);
  s.ahead = ahead;
  const Feature& out = stage.grad;
  const int64_t channels = min_of(stage.channels, out.channels - c), padded = round_up(channels, kPad);
  const bool last = stage.channels_last;
  // The terms are added up in `work`: in place, or in scratch memory where the gradient is to be written
  // once, by the last direct term.
  A* to = stage.direct ? static_cast<A*>(out.data) + n * out.stride_n + c * out.stride_c : s.grad;
  const int64_t scratch_row = last ? padded : planes_row(out);
  const int64_t to_row = stage.direct ? (last ? out.stride_s : out.stride_c) : scratch_row;
  int32_t direct = 0;
  for (int32_t t = 0; t < stage.terms; ++t) direct += stage.term[t].own.active ? 0 : 1;
  const bool once = stage.stream && direct > 0;
  A* work = once && stage.terms > 1 ? s.grad : to;
  const int64_t work_row = once && stage.terms > 1 ? scratch_row : to_row;
  bool add = false;
  for (int32_t t = 0; t < stage.terms; ++t) {
    const FspTerm& term = stage.term[t];
    if (!term.own.active) continue;
    const int64_t row = last ? padded : term.positions;
    multiply_term<A>(stage, t, n, c, channels, s, s.pooled, row, nullptr, 0, false);
    if (!add && (term.own.max || !tiles_exactly(term.own))) {
      const int64_t count = last ? out.positions : channels, width = last ? channels : out.positions;
      for (int64_t r = 0; r < count; ++r)
        __builtin_memset(work + r * work_row, 0, static_cast<size_t>(width) * sizeof(A));
      add = true;
    }
    if (term.own.max) {
      for (int64_t i = 0; i < channels; ++i) {
        load_planes<A>(stage.x, n, c + i, c + i + 1, s.plane);
        unpool_planes_add<A>(s.plane, 1, term.own, s.pooled + i * row, work + i * work_row);
      }
    } else if (last) {
      (add ? spread_positions<true, A> : spread_positions<false, A>)(s.pooled, row, channels, term.own, work,
                                                                     work_row);
    } else {
      (add ? spread_planes<true, A> : spread_planes<false, A>)(s.pooled, channels, term.own, s.plane, work,
                                                               work_row);
    }
    add = true;
  }
  for (int32_t t = 0; t < stage.terms; ++t) {
    if (stage.term[t].own.active) continue;
    const bool final = --direct == 0, stream = final && stage.stream;
    multiply_term<A>(stage, t, n, c, channels, s, final ? to : work, final ? to_row : work_row,
                     add ? work : nullptr, work_row, stream);
    add = true;
  }
  if (stage.direct) return;
  if (!last && out.layout != Layout::kPlanes) return store_planes<A>(s.grad, out, n, c, c + channels);
  with_type<A>(out.dtype, [&](auto t) {
    using T = decltype(t);
    T* base = static_cast<T*>(out.data) + n * out.stride_n + c * out.stride_c;
    const int64_t count = last ? out.positions : channels, width = last ? channels : out.positions;
    const int64_t row = last ? out.stride_s : out.stride_c;
    for (int64_t k = 0; k < count; ++k) convert_out<T, A>(s.grad + k * to_row, width, base + k * row);
  });
}

template <typename A>
static size_t backward_scratch(const FspBackward& call) {
  size_t most = 0;
  for (int64_t i = 0; i < call.count; ++i) {
    Arena arena = {nullptr, 0};
    backward_scratch_of<A>(call.stages[i], arena);
    most = arena.used > most ? arena.used : most;
  }
  return most;
}

template <typename A>
static void backward(const FspBackward& call, int64_t begin, int64_t end, void* scratch, Ahead* ahead) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const FspStage* stage = call.stages;
    int64_t block = unit % call.units_per_sample;
    for (; block >= stage->channel_blocks; ++stage) block -= stage->channel_blocks;
    backward_unit<A>(*stage, unit / call.units_per_sample, block * stage->channels, scratch, ahead);
  }
  stream_end();
}

template <typename A>
static void backward(const FspBackward& call, int64_t begin, int64_t end, void* scratch) {
  backward<A>(call, begin, end, scratch, nullptr);
}
