// The two passes over a feature that attention needs, for planes (lanes along positions): the energy of each
// position (the sum over channels of |x|^p), and the gradient (a coefficient for each position times h(x)).
// attention/last.inl has them for channels-last.
//
// Rounding errors grow with the number of additions: a running sum over thousands of channels would lose two
// or three bits of float. So channels are summed in blocks, one after the other, and the sums of the blocks
// are added in double.

// Channels of a block. Blocks of double are added in double too, so there are fewer of them.
template <typename A>
static constexpr int64_t kBlockChannels = sizeof(A) == sizeof(double) ? 128 : 32;

// Positions handled before going on to the next channels, so that their running energies stay in the
// first-level cache.
constexpr int64_t kBlock = 2048;

// How many planes are read side by side, and what is asked for ahead of them. Which is fastest depends on the
// processor (cpu/memory.h chooses); the order of the additions, and so each bit, is the same for all.
template <int64_t kPlanes>
struct Reading {
  static constexpr int64_t planes = kPlanes;
  // One plane: a few lines ahead in it. Several: the same place in each of the planes that follow, whose
  // pages the hardware notices too late.
  template <typename T>
  FASTKD_INLINE void prefetch(const T* x, int64_t stride_c) {
    if constexpr (kPlanes == 1) {
      __builtin_prefetch(reinterpret_cast<const char*>(x) + 512);
    } else {
      __builtin_prefetch(x + kPlanes * stride_c);
    }
  }
};

// The most planes side by side.
constexpr int64_t kLargestGroup = 8;

// Planes at distances of whole KiB share a few sets of the first-level cache, where eight of them and those
// asked for drive each other out. Others are read by the largest group, and so are small ones: the loop over
// one plane costs more than its memory.
constexpr int64_t kSharedSets = 1024, kSmallPlane = 256;

// f(Reading) for planes of so many positions, so many bytes apart. Only what everyone uses has a choice,
// float and p = 2: each reading is compiled into every loop.
template <typename A, typename P, typename F>
FASTKD_INLINE void with_reading(int64_t positions, int64_t stride_bytes, const F& f) {
  if constexpr (IsSquare<P>::value && sizeof(A) == sizeof(float)) {
    if (positions >= kSmallPlane && stride_bytes % kSharedSets == 0) {
      const int32_t planes = __atomic_load_n(&planes_side_by_side, __ATOMIC_RELAXED);
      if (planes == 1) return f(Reading<1>{});
      if (planes == 2) return f(Reading<2>{});
    }
  }
  return f(Reading<kLargestGroup>{});
}

// q[i] (+)= v[i] for the lanes i of v.
FASTKD_INLINE void add_block(double* q, VecD v, bool accumulate) {
  store<double, double>(q, accumulate ? load<double, double>(q) + v : v);
}
FASTKD_INLINE void add_block(double* q, VecF v, bool accumulate) {
  VecD low, high;
  widen(v, low, high);
  add_block(q, low, accumulate);
  add_block(q + kLanes<double>, high, accumulate);
}

// A part of the channels of a sum: `count` of them from the channel `first` on, of `total`.
struct Channels {
  int64_t first, count, total;
};

// A condition that a kernel is compiled for, and one that it looks at.
template <bool kValue>
struct Constant {
  static constexpr bool value = kValue;
};
struct Variable {
  bool value;
};

// f(c, grouped, opens, closes) step by step: channel c of the part and the others of a group of kGroup if
// `grouped`, else c alone; whether the step opens and closes a block.
template <typename A, int64_t kGroup, typename F>
FASTKD_INLINE void for_steps(const Channels& part, const F& f) {
  constexpr int64_t kWithin = kBlockChannels<A> - 1;
  for (int64_t c = 0; c < part.count;) {
    const int64_t begin = part.first + c;
    const bool grouped = c + kGroup <= part.count && begin % kGroup == 0;
    const int64_t end = begin + (grouped ? kGroup : 1);
    const bool opens = (begin & kWithin) == 0, closes = (end & kWithin) == 0 || end == part.total;
    if (!grouped) {
      f(c, Constant<false>{}, Variable{opens}, Variable{closes});
    } else if (opens) {
      f(c, Constant<true>{}, Constant<true>{}, Variable{closes});
    } else if (closes) {
      f(c, Constant<true>{}, Constant<false>{}, Constant<true>{});
    } else {
      f(c, Constant<true>{}, Constant<false>{}, Constant<false>{});
    }
    c = end - part.first;
  }
}

// energy_planes for bfloat16 and a count of whole pairs of vectors: two vectors at a time, which costs half.
// The running energies lie in the order of load_pair until their block ends.
template <typename R, typename P>
static void energy_planes_in_pairs(const BFloat16* x, const Channels& part, int64_t stride_c, int64_t count,
                                   float* block, double* q, const P& power) {
  constexpr int64_t W = kLanes<float>;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = min_of(begin + kBlock, count);
    for_steps<float, R::planes>(part, [&](int64_t c, auto grouped, auto opens, auto closes) {
      const BFloat16* row = x + c * stride_c;
      const bool accumulate = part.first + c >= kBlockChannels<float>;
      for (int64_t s = begin; s < end; s += 2 * W) {
        VecF low = {}, high = {};
        if (!opens.value) {
          low = load<float, float>(block + s);
          high = load<float, float>(block + s + W);
        }
        for (int64_t i = 0; i < (grouped.value ? R::planes : 1); ++i) {
          VecF even, odd;
          R::prefetch(row + i * stride_c + s, stride_c);
          load_pair(row + i * stride_c + s, even, odd);
          low += P::energy(power, even);
          high += P::energy(power, odd);
        }
        if (closes.value) {
          interleave(low, high);
          add_block(q + s, low, accumulate);
          add_block(q + s + W, high, accumulate);
        } else {
          store<float, float>(block + s, low);
          store<float, float>(block + s + W, high);
        }
      }
    });
  }
}

// Adds the energies of a part of the channels, of which x is the first, to q, the sums of `count` positions:
// those of the blocks that end within it. The running energies of a block that does not end there stay in
// `block`, `count` numbers and a vector, for the part that follows; q is complete once the last channel was
// added.
template <typename R, typename T, typename A, typename P>
static void energy_planes_by(const T* x, const Channels& part, int64_t stride_c, int64_t count, A* block,
                             double* q, const P& power) {
  constexpr int64_t W = kLanes<A>;
  if (count < W) {
    for (int64_t s = 0; s < count; ++s) {
      double total = part.first > 0 ? q[s] : 0;
      for (int64_t c = 0; c < part.count; ++c) total += P::energy1(power, to_acc<T, A>(x[c * stride_c + s]));
      q[s] = total;
    }
    return;
  }
  // The vectors [begin, end) of x, whose running energies are `running` and whose sums are `sums`.
  const auto add = [&](const T* from, int64_t begin, int64_t end, A* running, double* sums) {
    for_steps<A, R::planes>(part, [&](int64_t c, auto grouped, auto opens, auto closes) {
      const T* row = from + c * stride_c;
      const bool accumulate = part.first + c >= kBlockChannels<A>;
      for (int64_t s = begin; s < end; s += W) {
        Vec<A> v = {};
        if (!opens.value) v = load<A, A>(running + s);
        for (int64_t i = 0; i < (grouped.value ? R::planes : 1); ++i) {
          R::prefetch(row + i * stride_c + s, stride_c);
          v += P::energy(power, load<T, A>(row + i * stride_c + s));
        }
        if (closes.value) {
          add_block(sums + s, v, accumulate);
        } else {
          store<A, A>(running + s, v);
        }
      }
    });
  };
  // The last vector ends at the last position and may overlap the one before it; it is computed first, from q
  // as given, and stored last.
  const int64_t whole = count / W * W;
  double tail[W] = {};
  if (whole < count) {
    if (part.first > 0) __builtin_memcpy(tail, q + count - W, sizeof(tail));
    add(x + count - W, 0, W, block + count, tail);
  }
  int64_t pairs = 0;
  if constexpr (kInPairs<T, A>) {
    pairs = count / (2 * W) * (2 * W);
    energy_planes_in_pairs<R>(x, part, stride_c, pairs, block, q, power);
  }
  for (int64_t begin = pairs; begin < whole; begin += kBlock)
    add(x, begin, min_of(begin + kBlock, whole), block, q);
  if (whole < count) __builtin_memcpy(q + count - W, tail, sizeof(tail));
}

template <typename T, typename A, typename P>
static void energy_planes(const T* x, const Channels& part, int64_t stride_c, int64_t count, A* block,
                          double* q, const P& power) {
  with_reading<A, P>(count, stride_c * static_cast<int64_t>(sizeof(T)), [&](auto reading) {
    energy_planes_by<decltype(reading), T, A>(x, part, stride_c, count, block, q, power);
  });
}

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

// dx[c * dx_stride_c + s] = coefficient[s] * h(x[c * stride_c + s]). From the last channel to the first:
// those that were read last are still in the cache.
template <typename T, typename A, typename P>
static void gradient_planes(const T* x, int64_t channels, int64_t stride_c, int64_t count,
                            const A* coefficient, T* dx, int64_t dx_stride_c, bool streaming,
                            const P& power) {
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
