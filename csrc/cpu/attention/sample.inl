// What is done with the maps of one sample: sums over channels, coefficients of its gradient, the gradient.
// Needs the files that kernels.cpp includes before it.

// Hands out pieces of the scratch memory, each with a vector to spare: loops over positions may run to the
// end of a vector.
struct Bump {
  char* at;
};

template <typename A>
FASTKD_INLINE A* take(Bump& bump, int64_t count) {
  A* piece = reinterpret_cast<A*>(bump.at);
  bump.at += scratch_piece(count, sizeof(A));
  return piece;
}

template <typename A>
FASTKD_INLINE void clear(A* p, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = 0;
}

// A sample's map before normalization: sums over channels, which for "mean" still want to be divided (norm_of
// and normalized do it on the way). `full` differs from `map` only if the map was pooled: the map at the
// feature's own size.
struct PowerSums {
  double* map;
  double* full;
};

template <typename A, typename P>
static void power_sums_of(const AttentionSide& side, bool pooled, int64_t n, double* q, Bump bump,
                          const P& power) {
  const Feature& x = side.x;
  if (!pooled && x.layout != Layout::kGeneric) {
    with_type<A>(x.dtype, [&](auto t) {
      using T = decltype(t);
      const T* base = static_cast<const T*>(x.data) + n * x.stride_n;
      if (x.layout == Layout::kPlanes) {
        power_sum_planes<T, A>(base, {0, x.channels, x.channels}, x.stride_c, x.positions,
                               take<A>(bump, x.positions), q, power);
      } else {
        power_sum_channels_last<T, A>(base, x.channels, x.stride_s, x.positions, q, power);
      }
    });
    return;
  }
  const int64_t positions = pooled ? side.pool.out_positions : x.positions;
  A* plane = take<A>(bump, x.positions);
  A* block = take<A>(bump, positions);
  A* planes = take<A>(bump, side.chunk * positions);
  for (int64_t c = 0; c < x.channels; c += side.chunk) {
    const int64_t end = min_of(c + side.chunk, x.channels);
    if (pooled) {
      load_pooled(x, n, c, end, side.pool, plane, planes);
    } else {
      load_planes(x, n, c, end, planes);
    }
    power_sum_planes<A, A>(planes, {c, end - c, x.channels}, positions, positions, block, q, power);
  }
}

template <typename A>
static PowerSums make_power_sums(const AttentionSide& side, bool pool_before, const AttentionOptions& options,
                                 int64_t n, Bump& bump) {
  const bool before = side.pool.active && pool_before;
  const int64_t positions = before ? side.pool.out_positions : side.x.positions;
  PowerSums e;
  e.map = e.full = take<double>(bump, positions);
  with_power<A>(options, [&](const auto& power) { power_sums_of<A>(side, before, n, e.map, bump, power); });
  int64_t count = positions;
  if (side.pool.active && !pool_before) {
    count = side.pool.out_positions;
    e.map = take<double>(bump, count);
    pool_planes(e.full, 1, side.pool, e.map);
  }
  pad(e.map, count);
  return e;
}

// Writes a sample's coefficients: factor * dq, un-pooled where the map had been pooled.
template <typename A>
static void write_coefficients(const AttentionSide& side, bool pool_before, const double* g, const double* y,
                               double dot, const Norm& norm, double factor, const double* full, int64_t n,
                               Bump bump) {
  const int64_t count = side.pool.out_positions;
  A* out = static_cast<A*>(side.coefficients);
  if (!side.pool.active || pool_before)
    return normalize_backward(g, y, dot, count, norm, factor, out + n * count);
  A* pooled = take<A>(bump, count);
  normalize_backward(g, y, dot, count, norm, factor, pooled);
  out += n * side.x.positions;
  clear(out, side.x.positions);
  unpool_planes_add(full, 1, side.pool, pooled, out);
}

// dx = coefficient * h(x) for one sample, un-pooled if x had been pooled.
template <typename A, typename P>
static void gradient_of(const AttentionSide& side, const Feature& dx, int64_t n, const A* coefficient,
                        bool streaming, Bump bump, const P& power) {
  const Feature& x = side.x;
  if (!side.pool.active && x.layout == dx.layout && x.layout != Layout::kGeneric) {
    with_type<A>(x.dtype, [&](auto t) {
      using T = decltype(t);
      const T* from = static_cast<const T*>(x.data) + n * x.stride_n;
      T* to = static_cast<T*>(dx.data) + n * dx.stride_n;
      if (x.layout == Layout::kPlanes) {
        gradient_planes<T, A>(from, x.channels, x.stride_c, x.positions, coefficient, to, dx.stride_c,
                              streaming, power);
      } else {
        gradient_channels_last<T, A>(from, x.channels, x.stride_s, x.positions, coefficient, to, dx.stride_s,
                                     streaming, power);
      }
    });
    return;
  }
  const int64_t positions = x.positions;
  const int64_t pooled_positions = side.pool.out_positions;
  A* planes = take<A>(bump, side.chunk * positions);
  A* gradient = take<A>(bump, side.chunk * positions);
  A* pooled = take<A>(bump, side.chunk * pooled_positions);
  A* pooled_gradient = take<A>(bump, side.chunk * pooled_positions);
  for (int64_t c = 0; c < x.channels; c += side.chunk) {
    const int64_t end = min_of(c + side.chunk, x.channels);
    const int64_t channels = end - c;
    load_planes(x, n, c, end, planes);
    if (side.pool.active) {
      pool_planes(planes, channels, side.pool, pooled);
      gradient_planes<A, A>(pooled, channels, pooled_positions, pooled_positions, coefficient,
                            pooled_gradient, pooled_positions, false, power);
      clear(gradient, channels * positions);
      unpool_planes_add(planes, channels, side.pool, pooled_gradient, gradient);
    } else {
      gradient_planes<A, A>(planes, channels, positions, positions, coefficient, gradient, positions, false,
                            power);
    }
    store_planes(gradient, dx, n, c, end);
  }
}

// coefficient * grad, in scratch memory.
template <typename A>
static const A* scaled_by(double grad, const A* coefficient, int64_t count, Bump& bump) {
  if (grad == 1) return coefficient;
  A* scaled = take<A>(bump, count);
  const A factor = static_cast<A>(grad);
  for (int64_t i = 0; i < count; ++i) scaled[i] = coefficient[i] * factor;
  return scaled;
}

// The student's gradient from the coefficients just written, for the upstream gradient that is expected: what
// the backward pass would do.
template <typename A>
static void write_gradient(const AttentionLossArgs& args, const AttentionStage& stage, int64_t n, Bump bump) {
  AttentionSide side = stage.student;
  if (!args.pool_before) side.pool.active = 0;
  const int64_t count = side.pool.active ? side.pool.out_positions : side.x.positions;
  const A* coefficient =
      scaled_by(args.upstream, static_cast<const A*>(side.coefficients) + n * count, count, bump);
  with_power<A>(args.options, [&](const auto& power) {
    gradient_of<A>(side, stage.gradient, n, coefficient, stage.streaming, bump, power);
  });
}
