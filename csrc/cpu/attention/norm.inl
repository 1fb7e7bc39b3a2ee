// The normalization of an attention map, forward and backward. Maps of a sample lie in scratch memory in
// double, padded with zeros to a whole number of steps; sums over positions are taken in double, in the order
// of the positions. Needs vec.inl.

// Positions of a map are padded with zeros to a whole number of these.
constexpr int64_t kStep = kLanes<double>;

template <typename A>
FASTKD_INLINE void pad(A* map, int64_t count) {
  for (int64_t i = count; i < round_up(count, kStep); ++i) map[i] = 0;
}

// What the sums over channels are divided by.
static double reduction(const AttentionSide& side, const AttentionOptions& options) {
  return options.mean ? static_cast<double>(side.x.channels) : 1.0;
}

static Norm norm_for(double norm, const AttentionSide& side, const AttentionOptions& options) {
  return norm_from(norm, reduction(side, options), options.eps, options.add_eps);
}

static Norm norm_of(const double* map, int64_t count, const AttentionSide& side,
                    const AttentionOptions& options) {
  VecD total[2] = {};
  int64_t i = 0;
  for (; i + 2 * kStep <= count; i += 2 * kStep) {
    const VecD a = load<double, double>(map + i);
    const VecD b = load<double, double>(map + i + kStep);
    total[0] += a * a;
    total[1] += b * b;
  }
  for (; i < count; i += kStep) {
    const VecD q = load<double, double>(map + i);
    total[0] += q * q;
  }
  return norm_for(sqrt(sum(total[0] + total[1])) / reduction(side, options), side, options);
}

// y = q / divisor, rounded to A: equal maps then have equal y and no distance, however the compiler contracts
// what follows.
template <typename A>
FASTKD_INLINE VecD normalized(const double* q, const Norm& norm) {
  if constexpr (sizeof(A) == sizeof(double)) return load<double, double>(q) / norm.divisor;
  return widened(__builtin_convertvector(load<double, double>(q) * norm.reciprocal, HalfF));
}

// y of all the map's numbers. Writes `count` numbers and not one more.
template <typename A>
static void write_normalized(const double* q, int64_t count, const Norm& norm, A* y) {
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) store<A, double>(y + i, normalized<A>(q + i, norm));
  if (i < count) {
    const VecD last = normalized<A>(q + i, norm);
    for (int64_t lane = 0; i < count; ++i, ++lane) y[i] = static_cast<A>(last[lane]);
  }
}

// out = factor * dq for the gradient g of y; dot = <g, y>. Writes `count` numbers and not one more.
template <typename G, typename A>
static void normalize_backward(const G* g, const G* y, double dot, int64_t count, const Norm& norm,
                               double factor, A* out) {
  const double scale = factor * norm.scale;
  const double along = norm.along * dot;
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    VecD d = load<G, double>(g + i);
    if (norm.has_along) d -= load<G, double>(y + i) * along;
    store<A, double>(out + i, d * scale);
  }
  if (i < count) {
    VecD d = load<G, double>(g + i);
    if (norm.has_along) d -= load<G, double>(y + i) * along;
    d *= scale;
    for (int64_t lane = 0; i < count; ++i, ++lane) out[i] = static_cast<A>(d[lane]);
  }
}
