// A batch norm over rows of channels, with what stands before and after it in a residual network: passes over
// chunks that stay in the first caches. Sums over a chunk are float, one accumulator a channel;
// batch_norm.cpp adds the chunks in double, in their order.

// f(c, n) for n vectors (a constant) of channels from c on, four vectors at a time and then one, and g(c) for
// each channel that is left.
template <int N>
struct Count {
  static constexpr int value = N;
};
template <typename F, typename G>
FASTKD_INLINE void over_channels(int64_t channels, const F& f, const G& g) {
  constexpr int64_t W = kLanes<float>;
  int64_t c = 0;
  for (; c + 4 * W <= channels; c += 4 * W) f(c, Count<4>{});
  for (; c + W <= channels; c += W) f(c, Count<1>{});
  for (; c < channels; ++c) g(c);
}

// One vector, or one number, of storage type T.
template <typename T, typename V>
struct Piece;
template <typename T>
struct Piece<T, VecF> {
  FASTKD_INLINE VecF get(const T* p) { return load<T, float>(p); }
  FASTKD_INLINE void put(T* p, VecF v) { store<T, float>(p, v); }
};
template <typename T>
struct Piece<T, float> {
  FASTKD_INLINE float get(const T* p) { return to_acc<T, float>(*p); }
  FASTKD_INLINE void put(T* p, float v) { *p = from_acc<T, float>(v); }
};

// f(p) for each vector and each single number of the rows [begin, end), p its offset from the first row and c
// its channel.
template <typename F>
FASTKD_INLINE void over_rows(const NormRows& size, int64_t begin, int64_t end, const F& f) {
  constexpr int64_t W = kLanes<float>;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * size.channels;
    int64_t c = 0;
    for (; c + W <= size.channels; c += W) f(at + c, c, VecF{});
    for (; c < size.channels; ++c) f(at + c, c, float{});
  }
}

template <typename T>
static void moments_of(const NormArgs& args, int64_t chunk) {
  const int64_t C = args.size.channels, first = chunk * args.size.chunk,
                end = min_of(args.size.rows, first + args.size.chunk);
  const float share = 1.0f / static_cast<float>(end - first);
  const T* x = static_cast<const T*>(args.x);
  float* mean = args.parts + chunk * 2 * C;
  float* squares = mean + C;
  const auto block = [&](int64_t c, auto zero, auto count) {
    using V = decltype(zero);
    constexpr int N = decltype(count)::value;
    constexpr int64_t W = sizeof(V) / sizeof(float);
    V sum[N] = {}, square[N] = {}, middle[N];
    for (int64_t row = first; row < end; ++row)
      for (int i = 0; i < N; ++i) sum[i] += Piece<T, V>::get(x + row * C + c + i * W);
    for (int i = 0; i < N; ++i) middle[i] = sum[i] * share;
    for (int64_t row = first; row < end; ++row)
      for (int i = 0; i < N; ++i) {
        const V distance = Piece<T, V>::get(x + row * C + c + i * W) - middle[i];
        square[i] += distance * distance;
      }
    for (int i = 0; i < N; ++i) {
      Piece<float, V>::put(mean + c + i * W, middle[i]);
      Piece<float, V>::put(squares + c + i * W, square[i]);
    }
  };
  over_channels(
      C, [&](int64_t c, auto count) { block(c, VecF{}, count); },
      [&](int64_t c) { block(c, float{}, Count<1>{}); });
}

static void norm_moments(const NormArgs& args, int64_t begin, int64_t end) {
  with_type<float>(args.size.dtype, [&](auto type) {
    for (int64_t chunk = begin; chunk < end; ++chunk) moments_of<decltype(type)>(args, chunk);
  });
}

template <typename T, bool kResidual, bool kRelu>
static void apply_to(const NormArgs& args, int64_t begin, int64_t end) {
  const T *x = static_cast<const T*>(args.x), *residual = static_cast<const T*>(args.residual);
  T* y = static_cast<T*>(args.y);
  over_rows(args.size, begin * args.size.chunk, min_of(args.size.rows, end * args.size.chunk),
            [&](int64_t at, int64_t c, auto zero) {
              using V = decltype(zero);
              V value = (Piece<T, V>::get(x + at) - Piece<float, V>::get(args.mean + c)) *
                            Piece<float, V>::get(args.slope + c) +
                        Piece<float, V>::get(args.bias + c);
              if constexpr (kResidual) value += Piece<T, V>::get(residual + at);
              if constexpr (kRelu) value = chosen(value < V{}, V{}, value);  // a NaN stays
              Piece<T, V>::put(y + at, value);
            });
}

static void norm_apply(const NormArgs& args, int64_t begin, int64_t end) {
  with_type<float>(args.size.dtype, [&](auto type) {
    using T = decltype(type);
    if (args.residual)
      return args.relu ? apply_to<T, true, true>(args, begin, end)
                       : apply_to<T, true, false>(args, begin, end);
    return args.relu ? apply_to<T, false, true>(args, begin, end)
                     : apply_to<T, false, false>(args, begin, end);
  });
}

// How the gradient g before the ReLU is found.
enum class Gate { kNone, kByResult, kByInput };

template <typename T, Gate kGate, typename V>
FASTKD_INLINE V passed_at(const NormBackwardArgs& args, int64_t at, V grad, V distance, V slope, V bias) {
  if constexpr (kGate == Gate::kByResult)
    return chosen(Piece<T, V>::get(static_cast<const T*>(args.y) + at) <= V{}, V{}, grad);
  // the arithmetic of apply_to
  if constexpr (kGate == Gate::kByInput) return chosen(distance * slope + bias <= V{}, V{}, grad);
  return grad;
}

template <typename T, Gate kGate>
static void sums_of(const NormBackwardArgs& args, int64_t chunk) {
  const int64_t C = args.size.channels, first = chunk * args.size.chunk,
                end = min_of(args.size.rows, first + args.size.chunk);
  const T *x = static_cast<const T*>(args.x), *grad = static_cast<const T*>(args.grad);
  T* passed = static_cast<T*>(args.passed);
  float* total = args.parts + chunk * 2 * C;
  float* product = total + C;
  const auto block = [&](int64_t c, auto zero, auto count) {
    using V = decltype(zero);
    constexpr int N = decltype(count)::value;
    constexpr int64_t W = sizeof(V) / sizeof(float);
    V sum[N] = {}, dot[N] = {}, mean[N], slope[N], bias[N];
    for (int i = 0; i < N; ++i) {
      mean[i] = Piece<float, V>::get(args.mean + c + i * W);
      slope[i] = Piece<float, V>::get(args.slope + c + i * W);
      bias[i] = Piece<float, V>::get(args.bias + c + i * W);
    }
    for (int64_t row = first; row < end; ++row)
      for (int i = 0; i < N; ++i) {
        const int64_t at = row * C + c + i * W;
        const V distance = Piece<T, V>::get(x + at) - mean[i];
        const V g = passed_at<T, kGate>(args, at, Piece<T, V>::get(grad + at), distance, slope[i], bias[i]);
        if (passed) Piece<T, V>::put(passed + at, g);
        sum[i] += g;
        dot[i] += g * distance;
      }
    for (int i = 0; i < N; ++i) {
      Piece<float, V>::put(total + c + i * W, sum[i]);
      Piece<float, V>::put(product + c + i * W, dot[i]);
    }
  };
  over_channels(
      C, [&](int64_t c, auto count) { block(c, VecF{}, count); },
      [&](int64_t c) { block(c, float{}, Count<1>{}); });
}

template <typename T, Gate kGate>
static void gradient_of(const NormBackwardArgs& args, int64_t begin, int64_t end) {
  const T *x = static_cast<const T*>(args.x),
          *grad = static_cast<const T*>(args.passed ? args.passed : args.grad);
  T* dx = static_cast<T*>(args.dx);
  over_rows(args.size, begin * args.size.chunk, min_of(args.size.rows, end * args.size.chunk),
            [&](int64_t at, int64_t c, auto zero) {
              using V = decltype(zero);
              const V slope = Piece<float, V>::get(args.slope + c);
              const V distance = Piece<T, V>::get(x + at) - Piece<float, V>::get(args.mean + c);
              const V g = passed_at<T, kGate>(args, at, Piece<T, V>::get(grad + at), distance, slope,
                                              Piece<float, V>::get(args.bias + c));
              Piece<T, V>::put(dx + at, g * slope - distance * Piece<float, V>::get(args.along + c) -
                                            Piece<float, V>::get(args.constant + c));
            });
}

template <typename F>
FASTKD_INLINE void with_gate(const NormBackwardArgs& args, bool open, const F& f) {
  with_type<float>(args.size.dtype, [&](auto type) {
    using T = decltype(type);
    if (!args.relu || open) return f(type, Count<0>{});
    return args.y ? f(T{}, Count<1>{}) : f(T{}, Count<2>{});
  });
}

static void norm_sums(const NormBackwardArgs& args, int64_t begin, int64_t end) {
  with_gate(args, false, [&](auto type, auto gate) {
    constexpr Gate kGate = static_cast<Gate>(decltype(gate)::value);
    for (int64_t chunk = begin; chunk < end; ++chunk) sums_of<decltype(type), kGate>(args, chunk);
  });
}

static void norm_gradient(const NormBackwardArgs& args, int64_t begin, int64_t end) {
  with_gate(args, args.passed != nullptr, [&](auto type, auto gate) {
    gradient_of<decltype(type), static_cast<Gate>(decltype(gate)::value)>(args, begin, end);
  });
}

template <typename T, bool kResidual>
static void join(const JoinArgs& args, int64_t begin, int64_t end) {
  constexpr int64_t W = kLanes<float>;
  T* x = static_cast<T*>(args.x);
  const T* residual = static_cast<const T*>(args.residual);
  const auto at = [&](int64_t i, auto zero) {
    using V = decltype(zero);
    V value = Piece<T, V>::get(x + i);
    if constexpr (kResidual) value += Piece<T, V>::get(residual + i);
    Piece<T, V>::put(x + i, chosen(value < V{}, V{}, value));
  };
  int64_t i = begin;
  if constexpr (kInPairs<T, float>) {
    for (; i + 2 * W <= end; i += 2 * W) {
      VecF even, odd, others[2] = {};
      load_pair(x + i, even, odd);
      if constexpr (kResidual) load_pair(residual + i, others[0], others[1]);
      even += others[0], odd += others[1];
      store_pair(x + i, chosen(even < VecF{}, VecF{}, even), chosen(odd < VecF{}, VecF{}, odd), false);
    }
  }
  for (; i + W <= end; i += W) at(i, VecF{});
  for (; i < end; ++i) at(i, float{});
}

static void norm_join(const JoinArgs& args, int64_t begin, int64_t end) {
  with_type<float>(args.dtype, [&](auto type) {
    using T = decltype(type);
    args.residual ? join<T, true>(args, begin, end) : join<T, false>(args, begin, end);
  });
}

extern const NormKernels norm_kernels = {norm_moments, norm_apply, norm_sums, norm_gradient, norm_join};
