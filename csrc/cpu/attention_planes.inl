// The two passes over a feature that attention needs, for planes (lanes along positions): the energy of each position (the sum over
// channels of |x|^p), and the gradient (a coefficient for each position times h(x)). attention_last.inl has them for channels-last.

// Eight channels are read side by side: enough streams to keep the memory busy, and their sum is a tree, which keeps rounding errors of
// many channels small.
constexpr int64_t kStreams = 8;
// Positions handled before going on to the next channels, so that their running energies stay in the first-level cache.
constexpr int64_t kBlock = 4096;

template <typename A>
FASTKD_INLINE Vec<A> tree_of(const Vec<A>* e) {
  return ((e[0] + e[1]) + (e[2] + e[3])) + ((e[4] + e[5]) + (e[6] + e[7]));
}

template <typename T, typename A, typename P>
FASTKD_INLINE Vec<A> energy_of_streams(const T* x, int64_t stride_c, const P& power) {
  Vec<A> e[kStreams];
  for (int64_t i = 0; i < kStreams; ++i) {
    // The eight channels that follow: eight pages, of which the hardware notices each too late.
    __builtin_prefetch(x + (kStreams + i) * stride_c);
    e[i] = P::energy(power, load<T, A>(x + i * stride_c));
  }
  return tree_of<A>(e);
}

template <typename A>
FASTKD_INLINE Vec<A> zero_or(const A* q, bool accumulate) {
  return accumulate ? load<A, A>(q) : Vec<A>{};
}

// energy_planes for bfloat16 and a count of whole pairs of vectors: two vectors at a time, which costs half. The running energies lie in
// the order of load_pair, and are put in that of the positions at the end.
template <typename P>
static void energy_planes_in_pairs(const BFloat16* x, int64_t channels, int64_t stride_c, int64_t count, float* q, const P& power) {
  constexpr int64_t W = kLanes<float>;
  const int64_t grouped = channels / kStreams * kStreams;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = min_of(begin + kBlock, count);
    for (int64_t c = 0; c < channels; c += c < grouped ? kStreams : 1) {
      const BFloat16* row = x + c * stride_c;
      for (int64_t s = begin; s < end; s += 2 * W) {
        VecF low, high;
        if (c < grouped) {
          VecF l[kStreams], h[kStreams];
          for (int64_t i = 0; i < kStreams; ++i) {
            __builtin_prefetch(row + (kStreams + i) * stride_c + s);
            load_pair(row + i * stride_c + s, l[i], h[i]);
            l[i] = P::energy(power, l[i]);
            h[i] = P::energy(power, h[i]);
          }
          low = tree_of<float>(l);
          high = tree_of<float>(h);
        } else {
          load_pair(row + s, low, high);
          low = P::energy(power, low);
          high = P::energy(power, high);
        }
        store<float, float>(q + s, zero_or(q + s, c > 0) + low);
        store<float, float>(q + s + W, zero_or(q + s + W, c > 0) + high);
      }
    }
  }
  for (int64_t s = 0; s < count; s += 2 * W) {
    VecF low = load<float, float>(q + s), high = load<float, float>(q + s + W);
    interleave(low, high);
    store<float, float>(q + s, low);
    store<float, float>(q + s + W, high);
  }
}

// q[s] (+)= sum over channels of the energy of x[c * stride_c + s], for s < count.
template <typename T, typename A, typename P>
static void energy_planes(const T* x, int64_t channels, int64_t stride_c, int64_t count, A* q, bool accumulate, const P& power) {
  constexpr int64_t W = kLanes<A>;
  if constexpr (kInPairs<T, A>) {
    const int64_t pairs = accumulate ? 0 : count / (2 * W) * (2 * W);
    if (pairs > 0) {
      energy_planes_in_pairs(x, channels, stride_c, pairs, q, power);
      if (pairs == count) return;
      const int64_t begin = min_of(pairs, count - W);
      x += begin, q += begin, count -= begin;
    }
  }
  const int64_t grouped = channels / kStreams * kStreams;
  if (count < W) {
    for (int64_t s = 0; s < count; ++s) {
      double total = accumulate ? q[s] : 0;  // one long chain of additions
      for (int64_t c = 0; c < channels; ++c) total += P::energy1(power, to_acc<T, A>(x[c * stride_c + s]));
      q[s] = static_cast<A>(total);
    }
    return;
  }
  // The last vector ends at the last position and may overlap the one before it; it is computed first, from q as given, and stored last.
  const T* last = x + count - W;
  Vec<A> tail = {};
  if (count % W != 0) {
    tail = zero_or<A>(q + count - W, accumulate);
    for (int64_t c = 0; c < grouped; c += kStreams) tail += energy_of_streams<T, A>(last + c * stride_c, stride_c, power);
    for (int64_t c = grouped; c < channels; ++c) tail += P::energy(power, load<T, A>(last + c * stride_c));
  }
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t stop = min_of(begin + kBlock, count) - W;
    bool add = accumulate;
    for (int64_t c = 0; c < grouped; c += kStreams, add = true) {
      const T* row = x + c * stride_c;
      for (int64_t s = begin; s <= stop; s += W)
        store<A, A>(q + s, zero_or<A>(q + s, add) + energy_of_streams<T, A>(row + s, stride_c, power));
    }
    for (int64_t c = grouped; c < channels; ++c, add = true) {
      const T* row = x + c * stride_c;
      for (int64_t s = begin; s <= stop; s += W) store<A, A>(q + s, zero_or<A>(q + s, add) + P::energy(power, load<T, A>(row + s)));
    }
  }
  if (count % W != 0) store<A, A>(q + count - W, tail);
}

// gradient_planes for bfloat16 and a count of whole pairs of vectors.
template <typename P>
static void gradient_planes_in_pairs(const BFloat16* x, int64_t channels, int64_t stride_c, int64_t count, const float* coefficient,
                                     BFloat16* dx, int64_t dx_stride_c, bool streaming, const P& power) {
  constexpr int64_t W = kLanes<float>;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t block = min_of(kBlock, count - begin);
    float pairs[kBlock];  // the coefficients in the order of load_pair
    for (int64_t s = 0; s < block; s += 2 * W) {
      VecF low = load<float, float>(coefficient + begin + s), high = load<float, float>(coefficient + begin + s + W);
      deinterleave(low, high);
      store<float, float>(pairs + s, low);
      store<float, float>(pairs + s + W, high);
    }
    for (int64_t c = channels - 1; c >= 0; --c) {
      const BFloat16* from = x + c * stride_c + begin;
      BFloat16* to = dx + c * dx_stride_c + begin;
      for (int64_t s = 0; s < block; s += 2 * W) {
        VecF low, high;
        load_pair(from + s, low, high);
        low = P::slope(power, low) * load<float, float>(pairs + s);
        high = P::slope(power, high) * load<float, float>(pairs + s + W);
        store_pair(to + s, low, high, streaming);
      }
    }
  }
}

// dx[c * dx_stride_c + s] = coefficient[s] * h(x[c * stride_c + s]). From the last channel to the first: those that were read last are
// still in the cache.
template <typename T, typename A, typename P>
static void gradient_planes(const T* x, int64_t channels, int64_t stride_c, int64_t count, const A* coefficient, T* dx, int64_t dx_stride_c,
                            bool streaming, const P& power) {
  constexpr int64_t W = kLanes<A>;
  streaming = streaming && is_line(dx) && is_line(dx + dx_stride_c);
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
      for (int64_t s = 0; s < count; ++s) to[s] = from_acc<T, A>(P::slope1(power, to_acc<T, A>(from[s])) * coefficient[s]);
      continue;
    }
    int64_t s = 0;
    if (streaming) {
      for (; s + W <= count; s += W) stream<T, A>(to + s, P::slope(power, load<T, A>(from + s)) * load<A, A>(coefficient + s));
    } else {
      for (; s + W <= count; s += W) store<T, A>(to + s, P::slope(power, load<T, A>(from + s)) * load<A, A>(coefficient + s));
    }
    // The last vector overlaps the one before it: the same values again.
    s = count - W;
    if (count % W != 0) store<T, A>(to + s, P::slope(power, load<T, A>(from + s)) * load<A, A>(coefficient + s));
  }
}
