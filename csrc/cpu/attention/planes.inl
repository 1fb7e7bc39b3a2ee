// The first of the two passes over a feature that attention needs, for planes (lanes along positions): the
// channel power sum of each position, the sum over channels of |x|^p. planes_gradient.inl has the second;
// last.inl has both for channels-last.
//
// Rounding errors grow with the number of additions: a running sum over thousands of channels would lose two
// or three bits of float. So channels are summed in blocks, and the sums of the blocks are added in double.

// Eight channels are read side by side: enough streams to keep the memory busy, and their sum is a tree.
constexpr int64_t kStreams = 8;
// How many channels a block has, for a sum over so many: a power of two, at least kStreams. Small blocks are
// more exact, large ones take less time. Blocks of double are added in double too, so there are fewer of
// them.
template <typename A>
FASTKD_INLINE int64_t block_of(int64_t channels) {
  if (sizeof(A) == sizeof(double) || channels >= 512) return 128;
  return channels >= 128 ? 64 : 32;
}
// Positions handled before going on to the next channels, so that their running sums stay in the
// first-level cache.
constexpr int64_t kBlock = 2048;

template <typename A>
FASTKD_INLINE Vec<A> tree_of(const Vec<A>* e) {
  return ((e[0] + e[1]) + (e[2] + e[3])) + ((e[4] + e[5]) + (e[6] + e[7]));
}

template <typename T, typename A, typename P>
FASTKD_INLINE Vec<A> power_sum_of_streams(const T* x, int64_t stride_c, const P& power) {
  Vec<A> e[kStreams];
  for (int64_t i = 0; i < kStreams; ++i) {
    // The eight channels that follow: eight pages, of which the hardware notices each too late.
    __builtin_prefetch(x + (kStreams + i) * stride_c);
    e[i] = P::power_of(power, load<T, A>(x + i * stride_c));
  }
  return tree_of<A>(e);
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

// A condition that is known when a kernel is compiled, and one that is known when it runs.
template <bool kValue>
struct Constant {
  static constexpr bool value = kValue;
};
struct Variable {
  bool value;
};

// f(c, grouped, opens, closes) step by step: channel c of the part and the seven that follow if `grouped`,
// else c alone; whether the step opens and closes a block.
template <typename A, typename F>
FASTKD_INLINE void for_steps(const Channels& part, const F& f) {
  const int64_t within = block_of<A>(part.total) - 1;
  for (int64_t c = 0; c < part.count;) {
    const bool grouped = c + kStreams <= part.count;
    const int64_t begin = part.first + c, end = begin + (grouped ? kStreams : 1);
    const bool opens = (begin & within) == 0, closes = (end & within) == 0 || end == part.total;
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

// power_sum_planes for bfloat16 and a count of whole pairs of vectors: two vectors at a time, which costs
// half. The running sums lie in the order of load_pair until their block ends.
template <typename P>
static void power_sum_planes_in_pairs(const BFloat16* x, const Channels& part, int64_t stride_c,
                                      int64_t count, float* block, double* q, const P& power) {
  constexpr int64_t W = kLanes<float>;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = min_of(begin + kBlock, count);
    for_steps<float>(part, [&](int64_t c, auto grouped, auto opens, auto closes) {
      const BFloat16* row = x + c * stride_c;
      const bool accumulate = part.first + c >= block_of<float>(part.total);
      for (int64_t s = begin; s < end; s += 2 * W) {
        VecF low, high;
        if constexpr (grouped.value) {
          VecF l[kStreams], h[kStreams];
          for (int64_t i = 0; i < kStreams; ++i) {
            __builtin_prefetch(row + (kStreams + i) * stride_c + s);
            load_pair(row + i * stride_c + s, l[i], h[i]);
            l[i] = P::power_of(power, l[i]);
            h[i] = P::power_of(power, h[i]);
          }
          low = tree_of<float>(l);
          high = tree_of<float>(h);
        } else {
          load_pair(row + s, low, high);
          low = P::power_of(power, low);
          high = P::power_of(power, high);
        }
        if (!opens.value) {
          low += load<float, float>(block + s);
          high += load<float, float>(block + s + W);
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

// Adds the powers of a part of the channels, of which x is the first, to q, the sums of `count` positions:
// those of the blocks that end within it. The running sums of a block that does not end there stay in
// `block`, `count` numbers and a vector, for the part that follows; q is complete once the last channel was
// added.
template <typename T, typename A, typename P>
static void power_sum_planes(const T* x, const Channels& part, int64_t stride_c, int64_t count, A* block,
                             double* q, const P& power) {
  constexpr int64_t W = kLanes<A>;
  if (count < W) {
    for (int64_t s = 0; s < count; ++s) {
      double total = part.first > 0 ? q[s] : 0;
      for (int64_t c = 0; c < part.count; ++c)
        total += P::power_of1(power, to_acc<T, A>(x[c * stride_c + s]));
      q[s] = total;
    }
    return;
  }
  // A vector of the step that begins at `row`.
  const auto add = [&](const T* row, A* running, double* sums, bool accumulate, auto grouped, auto opens,
                       auto closes) {
    Vec<A> v;
    if constexpr (grouped.value) {
      v = power_sum_of_streams<T, A>(row, stride_c, power);
    } else {
      v = P::power_of(power, load<T, A>(row));
    }
    if (!opens.value) v += load<A, A>(running);
    if (closes.value) {
      add_block(sums, v, accumulate);
    } else {
      store<A, A>(running, v);
    }
  };
  // The last vector ends at the last position and may overlap the one before it; it is computed from q as
  // given, and stored last. It goes along with the others, so that memory is read once.
  const int64_t whole = count / W * W;
  double tail[W] = {};
  if (whole < count && part.first > 0) __builtin_memcpy(tail, q + count - W, sizeof(tail));
  int64_t begin = 0;
  if constexpr (kInPairs<T, A>) {
    begin = count / (2 * W) * (2 * W);
    power_sum_planes_in_pairs(x, part, stride_c, begin, block, q, power);
  }
  for (int64_t end; begin < count; begin = end < whole ? end : count) {
    end = min_of(begin + kBlock, whole);
    for_steps<A>(part, [&](int64_t c, auto grouped, auto opens, auto closes) {
      const T* row = x + c * stride_c;
      const bool accumulate = part.first + c >= block_of<A>(part.total);
      for (int64_t s = begin; s < end; s += W)
        add(row + s, block + s, q + s, accumulate, grouped, opens, closes);
      if (end == whole && whole < count)
        add(row + count - W, block + count, tail, accumulate, grouped, opens, closes);
    });
  }
  if (whole < count) __builtin_memcpy(q + count - W, tail, sizeof(tail));
}
