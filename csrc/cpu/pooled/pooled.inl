// The mean of squares over the channels and the mean over space of a feature, in one pass over it, and the
// gradient of both in one.

constexpr int64_t kPooledGroup = 8;  // channels that are added up before a map is written

// Adds a group of channels of a feature in planes to the map, and makes their means. Channels are added up in
// groups, so that rounding errors grow with the number of groups, not of channels.
template <int64_t kCount, typename T>
static void pooled_group(const T* x, int64_t positions, float share, float* map, bool first, float* mean) {
  constexpr int64_t W = kLanes<float>, kRun = 32;  // vectors whose sums stay in float
  VecD low, high;
  VecD totals[kCount] = {};
  double rests[kCount] = {};
  int64_t p = 0;
  while (p + W <= positions) {
    VecF sums[kCount] = {};
    for (const int64_t end = min_of(positions, p + kRun * W); p + W <= end; p += W) {
      VecF squares = {};
#pragma GCC unroll 8
      for (int64_t c = 0; c < kCount; ++c) {
        const VecF v = load<T, float>(x + c * positions + p);
        squares += v * v;
        sums[c] += v;
      }
      squares *= share;
      store<float, float>(map + p, first ? squares : load<float, float>(map + p) + squares);
    }
    for (int64_t c = 0; c < kCount; ++c) {
      widen(sums[c], low, high);
      totals[c] += low + high;
    }
  }
  for (; p < positions; ++p) {
    float squares = 0;
    for (int64_t c = 0; c < kCount; ++c) {
      const float v = to_acc<T, float>(x[c * positions + p]);
      squares += v * v;
      rests[c] += v;
    }
    map[p] = (first ? 0.0f : map[p]) + squares * share;
  }
  for (int64_t c = 0; c < kCount; ++c)
    mean[c] = static_cast<float>((sum(totals[c]) + rests[c]) / static_cast<double>(positions));
}

template <typename T>
static void pooled_planes(const PooledArgs& args, const T* x, float* map, float* mean) {
  const float share = 1 / static_cast<float>(args.channels);
  int64_t c = 0;
  for (; c + kPooledGroup <= args.channels; c += kPooledGroup)
    pooled_group<kPooledGroup>(x + c * args.positions, args.positions, share, map, c == 0, mean + c);
  for (; c < args.channels; ++c)
    pooled_group<1>(x + c * args.positions, args.positions, share, map, c == 0, mean + c);
}

template <typename T>
static void pooled_positions(const PooledArgs& args, const T* x, float* map, float* mean) {
  constexpr int64_t W = kLanes<float>;
  const int64_t channels = args.channels;
  const float share = 1 / static_cast<float>(channels), part = 1 / static_cast<float>(args.positions);
  for (int64_t c = 0; c < channels; ++c) mean[c] = 0;
  for (int64_t p = 0; p < args.positions; ++p, x += channels) {
    VecF squares = {};
    float rest = 0;
    int64_t c = 0;
    for (; c + W <= channels; c += W) {
      const VecF v = load<T, float>(x + c);
      squares += v * v;
      store<float, float>(mean + c, load<float, float>(mean + c) + v);
    }
    for (; c < channels; ++c) {
      const float v = to_acc<T, float>(x[c]);
      rest += v * v;
      mean[c] += v;
    }
    VecD low, high;
    widen(squares, low, high);
    map[p] = (static_cast<float>(sum(low + high)) + rest) * share;
  }
  for (int64_t c = 0; c < channels; ++c) mean[c] *= part;
}

static void pooled_forward(const PooledArgs& args, int64_t begin, int64_t end) {
  with_type<float>(args.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t n = begin; n < end; ++n) {
      const T* x = static_cast<const T*>(args.data) + n * args.channels * args.positions;
      float *map = args.map + n * args.positions, *mean = args.mean + n * args.channels;
      args.planes ? pooled_planes(args, x, map, mean) : pooled_positions(args, x, map, mean);
    }
  });
}

// dx = by x + plus for the numbers [0, count); `by` and `plus` are one number for all, or one for each.
// Without x dx is `plus` alone: an infinity, times a gradient that does not arrive, would be NaN.
template <typename T, typename By, typename Plus>
FASTKD_INLINE void pooled_run(const T* x, T* to, int64_t count, const By& by, const Plus& plus) {
  constexpr int64_t W = kLanes<float>;
  const auto number = [&](int64_t i, auto zero) {
    return x ? at(x + i, zero) * by(i, zero) + plus(i, zero) : plus(i, zero);
  };
  int64_t i = 0;
  for (; i + W <= count; i += W) store<T, float>(to + i, number(i, VecF{}));
  for (; i < count; ++i) to[i] = from_acc<T, float>(number(i, float{}));
}

static void pooled_backward(const PooledArgs& args, int64_t begin, int64_t end) {
  const float twice = 2 / static_cast<float>(args.channels), part = 1 / static_cast<float>(args.positions);
  with_type<float>(args.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t channels = args.channels, positions = args.positions;
    for (int64_t n = begin; n < end; ++n) {
      const T* x = static_cast<const T*>(args.data) + n * channels * positions;
      T* to = static_cast<T*>(args.grad) + n * channels * positions;
      const float* map = args.map_grad ? args.map_grad + n * positions : nullptr;
      const float* mean = args.mean_grad ? args.mean_grad + n * channels : nullptr;
      const auto many = [](const float* from, float factor) {
        return [=](int64_t i, auto zero) { return from ? at(from + i, zero) * factor : zero; };
      };
      const auto one = [](const float* from, int64_t i, float factor) {
        const float value = from ? from[i] * factor : 0.0f;
        return [=](int64_t, auto zero) { return value - zero; };
      };
      const auto from = [&](int64_t i) { return map ? x + i : nullptr; };
      if (args.planes) {
        for (int64_t c = 0; c < channels; ++c)
          pooled_run(from(c * positions), to + c * positions, positions, many(map, twice),
                     one(mean, c, part));
      } else {
        for (int64_t p = 0; p < positions; ++p)
          pooled_run(from(p * channels), to + p * channels, channels, one(map, p, twice), many(mean, part));
      }
    }
  });
}

extern const PooledKernels pooled_kernels = {pooled_forward, pooled_backward};
