// The two passes over a feature that attention needs, for channels-last (lanes along channels): the
// channel power sum of each position, and the gradient. planes.inl and planes_gradient.inl have them for
// planes.

// even/odd lanes of two vectors, one after the other
template <typename V, typename I>
FASTKD_INLINE V even_odd_sum_of(V a, V b) {
  I even;
  for (size_t i = 0; i < sizeof(V) / sizeof(a[0]); ++i) even[i] = 2 * i;
  return FASTKD_SHUFFLE(a, b, even) + FASTKD_SHUFFLE(a, b, even + 1);
}
FASTKD_INLINE VecF even_odd_sum(VecF a, VecF b) { return even_odd_sum_of<VecF, IntF>(a, b); }
FASTKD_INLINE VecD even_odd_sum(VecD a, VecD b) { return even_odd_sum_of<VecD, IntD>(a, b); }

// q[i] is the sum of the i-th run of lanes of v[0], v[1], ..., v[n - 1]: runs are whole vectors where n =
// kLanes<A>, halves of vectors where n is half of that. The last additions are made in double. Overwrites v.
FASTKD_INLINE void store_sums(VecF* v, int64_t n, double* q) {
  for (; n > 2; n /= 2) {
    for (int64_t i = 0; i < n / 2; ++i) v[i] = even_odd_sum(v[2 * i], v[2 * i + 1]);
  }
  for (int64_t i = 0; i < 2; ++i) {
    VecD low, high;
    widen(v[i], low, high);
    store<double, double>(q + i * kLanes<double>, even_odd_sum(low, high));
  }
}
FASTKD_INLINE void store_sums(VecD* v, int64_t n, double* q) {
  for (; n > 1; n /= 2) {
    for (int64_t i = 0; i < n / 2; ++i) v[i] = even_odd_sum(v[2 * i], v[2 * i + 1]);
  }
  store<double, double>(q, v[0]);
}

// How far ahead a pass over consecutive memory prefetches: beyond what the hardware has asked for by itself,
// and often past the end of the page, where the hardware stops.
constexpr int64_t kAhead = 2048;

template <int64_t Bytes>
FASTKD_INLINE void prefetch_stream(const void* p) {
  for (int64_t i = 0; i < Bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + kAhead + i);
}

// Rows of so many vectors are wide: they are summed in eight vectors instead of two, and those in runs of so
// many additions, so that rounding errors do not grow with the number of channels.
constexpr int64_t kWide = 32, kRun = 32;

// The power sum of one position, still to be added up over the lanes. `mask` keeps the lanes of the last
// vector that no other vector held.
template <bool kIsWide, typename T, typename A, typename P>
FASTKD_INLINE Vec<A> power_sum_of_row(const T* x, int64_t channels, Mask<A> mask, const P& power) {
  constexpr int64_t W = kLanes<A>;
  const auto add_pair = [&](const T* at, Vec<A>& first, Vec<A>& second) {
    prefetch_stream<2 * W * sizeof(T)>(at);
    Vec<A> low, high;
    if constexpr (kInPairs<T, A>) {
      load_pair(at, low, high);
    } else {
      low = load<T, A>(at);
      high = load<T, A>(at + W);
    }
    first += P::power_of(power, low);
    second += P::power_of(power, high);
  };
  Vec<A> a = {}, b = {};
  int64_t c = 0;
  if constexpr (kIsWide) {
    while (c + 8 * W <= channels) {
      Vec<A> sums[8] = {};
      for (const int64_t stop = min_of(channels, c + kRun * 8 * W); c + 8 * W <= stop; c += 8 * W) {
        for (int64_t i = 0; i < 8; i += 2) add_pair(x + c + i * W, sums[i], sums[i + 1]);
      }
      a += (sums[0] + sums[2]) + (sums[4] + sums[6]);
      b += (sums[1] + sums[3]) + (sums[5] + sums[7]);
    }
  }
  for (; c + 2 * W <= channels; c += 2 * W) add_pair(x + c, a, b);
  if (c + W <= channels) {
    prefetch_stream<W * sizeof(T)>(x + c);
    a += P::power_of(power, load<T, A>(x + c));
    c += W;
  }
  if (c < channels)
    b += (Vec<A>)((Mask<A>)P::power_of(power, load<T, A>(c >= W ? x + channels - W : x)) & mask);
  return a + b;
}

// The power sums of adjacent positions of as many channels as a vector has lanes: a pair of vectors holds two
// of them, each in a half.
template <typename P>
static int64_t power_sum_of_two(const BFloat16* x, int64_t count, double* q, const P& power) {
  constexpr int64_t W = kLanes<float>;
  int64_t s = 0;
  for (; s + W <= count; s += W) {
    VecF rows[W / 2];
    for (int64_t i = 0; i < W / 2; ++i) {
      const BFloat16* row = x + (s + 2 * i) * W;
      prefetch_stream<2 * W * sizeof(BFloat16)>(row);
      VecF even, odd;
      load_pair(row, even, odd);
      rows[i] = P::power_of(power, even) + P::power_of(power, odd);
    }
    // Lanes of the lower halves are summed apart from those of the upper ones: 8 sums of 2 x 8 lanes, in the
    // order of the positions.
    store_sums(rows, W / 2, q + s);
  }
  return s;
}

// The power sums of W positions of at least W channels each.
template <bool kIsWide, int64_t kVectors, typename T, typename A, typename P>
FASTKD_INLINE void power_sums_of_group(const T* x, int64_t channels, int64_t stride_s, Mask<A> mask,
                                       double* q, const P& power) {
  constexpr int64_t W = kLanes<A>;
  Vec<A> rows[W];
  for (int64_t i = 0; i < W; ++i)
    rows[i] = power_sum_of_row<kIsWide, T, A>(x + i * stride_s, kVectors > 0 ? kVectors * W : channels, mask,
                                              power);
  store_sums(rows, W, q);
}

// kVectors: how many vectors a position's channels fill, where the loop over them is compiled for that, else
// 0.
template <bool kIsWide, int64_t kVectors, typename T, typename A, typename P>
static void power_sum_of_rows(const T* x, int64_t channels, int64_t stride_s, int64_t count, double* q,
                              const P& power) {
  constexpr int64_t W = kLanes<A>;
  Mask<A> mask;
  for (int64_t i = 0; i < W; ++i) mask[i] = (channels >= W ? i >= W - channels % W : i < channels) ? -1 : 0;
  int64_t s = 0;
  if constexpr (kInPairs<T, A>) {
    if (channels == W && stride_s == W) s = power_sum_of_two(x, count, q, power);
  }
  const auto group = [&](int64_t at) {
    power_sums_of_group<kIsWide, kVectors, T, A>(x + at * stride_s, channels, stride_s, mask, q + at, power);
  };
  if (channels >= W) {
    // Both halves of the positions side by side: the hardware fetches ahead in each.
    const int64_t half = (count - s) / (2 * W) * W, end = s + half;
    for (; s < end; s += W) {
      group(s);
      group(s + half);
    }
    s += half;
  }
  // With fewer channels than lanes a vector reads on into the next positions: stop before the last of these.
  for (; s + W <= count &&
         (channels >= W || (stride_s > 0 && (s + W - 1) * stride_s + W <= (count - 1) * stride_s + channels));
       s += W)
    group(s);
  for (; s < count; ++s) {
    const T* row = x + s * stride_s;
    if (channels >= W) {
      Vec<A> rows[W] = {power_sum_of_row<kIsWide, T, A>(row, channels, mask, power)};
      double sums[W];
      store_sums(rows, W, sums);
      q[s] = sums[0];
    } else {
      double total = 0;
      for (int64_t c = 0; c < channels; ++c) total += P::power_of1(power, to_acc<T, A>(row[c]));
      q[s] = total;
    }
  }
}

// q[s] = sum over channels c of the power of x[s * stride_s + c]. Nothing is read outside of [x, the last
// element of the last position].
template <typename T, typename A, typename P>
static void power_sum_channels_last(const T* x, int64_t channels, int64_t stride_s, int64_t count, double* q,
                                    const P& power) {
  constexpr int64_t W = kLanes<A>;
  if (channels >= kWide * W) return power_sum_of_rows<true, 0, T, A>(x, channels, stride_s, count, q, power);
  if constexpr (P::kFrequent && sizeof(A) == sizeof(float)) {
    // the widths of CIFAR's networks, where the loop over channels is short
    if (channels == 2 * W) return power_sum_of_rows<false, 2, T, A>(x, channels, stride_s, count, q, power);
    if (channels == 4 * W) return power_sum_of_rows<false, 4, T, A>(x, channels, stride_s, count, q, power);
    if (channels == 8 * W) return power_sum_of_rows<false, 8, T, A>(x, channels, stride_s, count, q, power);
  }
  power_sum_of_rows<false, 0, T, A>(x, channels, stride_s, count, q, power);
}

// One position's gradient, for a whole number of vectors (pairs of vectors where they go in pairs).
template <typename T, typename A, bool Stream, typename P>
FASTKD_INLINE void gradient_of_row(const T* x, int64_t channels, A coefficient, T* dx, const P& power) {
  const Vec<A> k = broadcast<A>(coefficient);
  if constexpr (kInPairs<T, A>) {
    for (int64_t c = 0; c < channels; c += 2 * kLanes<A>) {
      VecF even, odd;
      load_pair(x + c, even, odd);
      store_pair(dx + c, P::slope(power, even) * k, P::slope(power, odd) * k, Stream);
    }
  } else {
    for (int64_t c = 0; c < channels; c += kLanes<A>) {
      const Vec<A> v = P::slope(power, load<T, A>(x + c)) * k;
      Stream ? stream<T, A>(dx + c, v) : store<T, A>(dx + c, v);
    }
  }
}

// From the last position to the first: those that were read last are still in the cache.
template <typename T, typename A, bool Stream, typename P>
static void gradient_of_rows(const T* x, int64_t channels, int64_t stride_s, int64_t count,
                             const A* coefficient, T* dx, int64_t dx_stride_s, const P& power) {
  constexpr int64_t W = kInPairs<T, A> ? 2 * kLanes<A> : kLanes<A>;
  if (channels == W) {  // what the loop over channels costs is then most of the work
    for (int64_t s = count - 1; s >= 0; --s)
      gradient_of_row<T, A, Stream>(x + s * stride_s, W, coefficient[s], dx + s * dx_stride_s, power);
  } else {
    for (int64_t s = count - 1; s >= 0; --s)
      gradient_of_row<T, A, Stream>(x + s * stride_s, channels, coefficient[s], dx + s * dx_stride_s, power);
  }
}

FASTKD_INLINE VecF halves(float lower, float upper) {
  IntF mask;
  for (int64_t i = 0; i < kLanes<float>; ++i) mask[i] = i < kLanes<float> / 2 ? -1 : 0;
  return (VecF)(((IntF)broadcast(lower) & mask) | ((IntF)broadcast(upper) & ~mask));
}

// Adjacent positions of as many channels as a vector has lanes: two of them fill a pair of vectors, each a
// half.
template <typename P>
static void gradient_of_two(const BFloat16* x, int64_t count, const float* coefficient, BFloat16* dx,
                            bool streaming, const P& power) {
  constexpr int64_t W = kLanes<float>;
  for (int64_t s = count - 2; s >= 0; s -= 2) {
    VecF even, odd;
    load_pair(x + s * W, even, odd);
    const VecF k = halves(coefficient[s], coefficient[s + 1]);
    store_pair(dx + s * W, P::slope(power, even) * k, P::slope(power, odd) * k, streaming);
  }
}

// dx[s * dx_stride_s + c] = coefficient[s] * h(x[s * stride_s + c]).
template <typename T, typename A, typename P>
static void gradient_channels_last(const T* x, int64_t channels, int64_t stride_s, int64_t count,
                                   const A* coefficient, T* dx, int64_t dx_stride_s, bool streaming,
                                   const P& power) {
  constexpr int64_t W = kLanes<A>;
  if constexpr (kInPairs<T, A>) {
    if (channels == W && stride_s == W && dx_stride_s == W && count % 2 == 0) {
      return gradient_of_two(x, count, coefficient, dx, streaming && is_line(dx), power);
    }
  }
  if (channels % (kInPairs<T, A> ? 2 * W : W) == 0) {
    if (streaming && is_line(dx) && is_line(dx + dx_stride_s)) {
      gradient_of_rows<T, A, true>(x, channels, stride_s, count, coefficient, dx, dx_stride_s, power);
    } else {
      gradient_of_rows<T, A, false>(x, channels, stride_s, count, coefficient, dx, dx_stride_s, power);
    }
    return;
  }
  const int64_t whole = channels / W * W;
  // With fewer channels than lanes, a vector writes on into positions that come later and are then written
  // properly. Only where positions are adjacent: what lies in a gap may belong to another sample.
  const bool spill = channels < W && stride_s == channels && dx_stride_s == channels;
  for (int64_t s = 0; s < count; ++s, x += stride_s, dx += dx_stride_s) {
    const Vec<A> k = broadcast<A>(coefficient[s]);
    for (int64_t c = 0; c < whole; c += W) store<T, A>(dx + c, P::slope(power, load<T, A>(x + c)) * k);
    if (whole == channels) continue;
    if (whole > 0) {
      const int64_t c = channels - W;
      store<T, A>(dx + c, P::slope(power, load<T, A>(x + c)) * k);
    } else if (spill && (count - s) * channels >= W) {
      store<T, A>(dx, P::slope(power, load<T, A>(x)) * k);
    } else {
      for (int64_t c = 0; c < channels; ++c)
        dx[c] = from_acc<T, A>(P::slope1(power, to_acc<T, A>(x[c])) * coefficient[s]);
    }
  }
}
