// The second of the two passes over a feature that attention needs, for planes: the gradient, a coefficient
// for each position times h(x), the slope of power.inl. planes.inl has the first.

// Numbers that loops over memory handle at a time: a vector, or a pair of them.
template <typename T, typename A>
static constexpr int64_t kRunOfNumbers = kInPairs<T, A> ? 2 * kLanes<A> : kLanes<A>;

// gradient_planes for bfloat16 and a count of whole pairs of vectors.
template <typename P>
static void gradient_planes_in_pairs(const BFloat16* x, int64_t channels, int64_t stride_c, int64_t count,
                                     const float* coefficient, BFloat16* dx, int64_t dx_stride_c,
                                     bool streaming, const P& power) {
  constexpr int64_t W = kLanes<float>;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t block = min_of(kBlock, count - begin);
    float pairs[kBlock];  // the coefficients in the order of load_pair
    for (int64_t s = 0; s < block; s += 2 * W) {
      VecF low = load<float, float>(coefficient + begin + s),
           high = load<float, float>(coefficient + begin + s + W);
      deinterleave(low, high);
      store<float, float>(pairs + s, low);
      store<float, float>(pairs + s + W, high);
    }
    const auto pair = [&](int64_t c, int64_t at, VecF k_even, VecF k_odd) {
      VecF even, odd;
      load_pair(x + c * stride_c + begin + at, even, odd);
      store_pair(dx + c * dx_stride_c + begin + at, P::slope(power, even) * k_even,
                 P::slope(power, odd) * k_odd, streaming);
    };
    int64_t c = channels - 1;
    for (; streaming && c > 0; c -= 2) {  // as in stream_two_planes
      for (int64_t s = block - 2 * W; s >= 0; s -= 2 * W) {
        const VecF even = load<float, float>(pairs + s), odd = load<float, float>(pairs + s + W);
        pair(c, s, even, odd);
        pair(c - 1, s, even, odd);
      }
    }
    for (; c >= 0; --c) {
      for (int64_t s = 0; s < block; s += 2 * W)
        pair(c, s, load<float, float>(pairs + s), load<float, float>(pairs + s + W));
    }
  }
}

// The gradient of dense planes, `count` positions each, as one run of numbers past the caches: planes that do
// not begin with a cache line could not be streamed one by one. From the last number to the first.
template <typename T, typename A, typename P>
static void stream_dense_planes(const T* x, int64_t channels, int64_t count, const A* coefficient, T* dx,
                                const P& power) {
  constexpr int64_t W = kLanes<A>;
  A repeated[kBlock + kRunOfNumbers<T, A>];  // the coefficients, and on from the first again
  __builtin_memcpy(repeated, coefficient, static_cast<size_t>(count) * sizeof(A));
  __builtin_memcpy(repeated + count, coefficient, kRunOfNumbers<T, A> * sizeof(A));
  int64_t i = channels * count, s = count;
  const auto one = [&]() {
    --i;
    s = (s == 0 ? count : s) - 1;
    dx[i] = from_acc<T, A>(P::slope1(power, to_acc<T, A>(x[i])) * repeated[s]);
  };
  while (i > 0 && !is_line(dx + i)) one();
  while (i >= kRunOfNumbers<T, A>) {
    i -= kRunOfNumbers<T, A>;
    s -= kRunOfNumbers<T, A>;
    if (s < 0) s += count;
    Vec<A> k = load<A, A>(repeated + s);
    if constexpr (kInPairs<T, A>) {
      VecF even, odd, high = load<A, A>(repeated + s + W);
      deinterleave(k, high);
      load_pair(x + i, even, odd);
      store_pair(dx + i, P::slope(power, even) * k, P::slope(power, odd) * high, true);
    } else {
      stream<T, A>(dx + i, P::slope(power, load<T, A>(x + i)) * k);
    }
  }
  while (i > 0) one();
}

// The gradient of an even number of planes past the caches, each a whole number of cache lines. Two planes
// side by side: where planes are as large as pages, reads and writes of the same place in a page disturb each
// other less. From the last number to the first.
template <typename A, typename P>
static void stream_two_planes(const A* x, int64_t channels, int64_t stride_c, int64_t count,
                              const A* coefficient, A* dx, int64_t dx_stride_c, const P& power) {
  constexpr int64_t W = kLanes<A>;
  for (int64_t c = channels - 2; c >= 0; c -= 2) {
    const A *low = x + c * stride_c, *high = low + stride_c;
    A *to_low = dx + c * dx_stride_c, *to_high = to_low + dx_stride_c;
    for (int64_t s = count - W; s >= 0; s -= W) {
      const Vec<A> k = load<A, A>(coefficient + s);
      stream<A, A>(to_high + s, P::slope(power, load<A, A>(high + s)) * k);
      stream<A, A>(to_low + s, P::slope(power, load<A, A>(low + s)) * k);
    }
  }
}

// dx[c * dx_stride_c + s] = coefficient[s] * h(x[c * stride_c + s]). From the last channel to the first:
// those that were read last are still in the cache.
template <typename T, typename A, typename P>
static void gradient_planes(const T* x, int64_t channels, int64_t stride_c, int64_t count,
                            const A* coefficient, T* dx, int64_t dx_stride_c, bool streaming,
                            const P& power) {
  constexpr int64_t W = kLanes<A>;
  const bool lines = is_line(dx) && is_line(dx + dx_stride_c);
  if constexpr (sizeof(T) == sizeof(A)) {
    if (streaming && lines && channels % 2 == 0 && count % W == 0)
      return stream_two_planes(x, channels, stride_c, count, coefficient, dx, dx_stride_c, power);
  }
  if constexpr (sizeof(T) == sizeof(A) || kInPairs<T, A>) {
    if (streaming && !lines && stride_c == count && dx_stride_c == count && count >= kRunOfNumbers<T, A> &&
        count <= kBlock)
      return stream_dense_planes<T, A>(x, channels, count, coefficient, dx, power);
  }
  streaming = streaming && lines;
  if constexpr (kInPairs<T, A>) {
    const int64_t pairs = count / (2 * W) * (2 * W);
    if (pairs > 0) {
      gradient_planes_in_pairs(x, channels, stride_c, pairs, coefficient, dx, dx_stride_c, streaming, power);
      if (pairs == count) return;
      const int64_t begin = min_of(pairs, count - W);
      x += begin, dx += begin, coefficient += begin, count -= begin;
    }
  }
  for (int64_t c = channels - 1; c >= 0; --c) {
    const T* from = x + c * stride_c;
    T* to = dx + c * dx_stride_c;
    if (count < W) {
      for (int64_t s = 0; s < count; ++s)
        to[s] = from_acc<T, A>(P::slope1(power, to_acc<T, A>(from[s])) * coefficient[s]);
      continue;
    }
    int64_t s = 0;
    if (streaming) {
      for (; s + W <= count; s += W)
        stream<T, A>(to + s, P::slope(power, load<T, A>(from + s)) * load<A, A>(coefficient + s));
    } else {
      for (; s + W <= count; s += W)
        store<T, A>(to + s, P::slope(power, load<T, A>(from + s)) * load<A, A>(coefficient + s));
    }
    // The last vector overlaps the one before it: the same values again.
    s = count - W;
    if (count % W != 0)
      store<T, A>(to + s, P::slope(power, load<T, A>(from + s)) * load<A, A>(coefficient + s));
  }
}
