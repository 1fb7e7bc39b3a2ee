// The taps: passes over a feature that a network makes anyway, with the attention map's work done on the way.
// Needs attention.inl.

// f(T{}, A{}) with the storage type of dtype and the type it is accumulated in.
template <typename F>
FASTKD_INLINE void with_types(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kHalf:
      return f(Half{}, float{});
    case DType::kBFloat16:
      return f(BFloat16{}, float{});
    case DType::kFloat:
      return f(float{}, float{});
    case DType::kDouble:
      return f(double{}, double{});
  }
}

// Numbers of y written before their powers are summed: few enough to be read from the first-level cache.
constexpr int64_t kPiece = 4096;

// y = relu(x + r) for `rows` runs of `count` numbers. A NaN stays, as in PyTorch.
template <bool kSum, typename T, typename A>
static void relu_rows(const T* x, int64_t x_stride, const T* r, int64_t r_stride, T* y, int64_t y_stride,
                      int64_t rows, int64_t count) {
  constexpr int64_t W = kLanes<A>;
  if (x_stride == count && y_stride == count && (!kSum || r_stride == count)) {
    count *= rows;
    rows = 1;
  }
  for (int64_t i = 0; i < rows; ++i, x += x_stride, y += y_stride) {
    int64_t s = 0;
    for (; s + W <= count; s += W) {
      Vec<A> v = load<T, A>(x + s);
      if constexpr (kSum) v += load<T, A>(r + s);
      store<T, A>(y + s, (Vec<A>)((Mask<A>)v & ~(Mask<A>)(v < 0)));
    }
    for (; s < count; ++s) {
      A v = to_acc<T, A>(x[s]);
      if constexpr (kSum) v += to_acc<T, A>(r[s]);
      y[s] = from_acc<T, A>(v < 0 ? 0 : v);
    }
    if constexpr (kSum) r += r_stride;
  }
}

// y = relu(x + residual) and q, the channel power sums of y as rounded to its dtype, for one
// sample.
template <bool kSum, typename T, typename A, typename P>
static void relu_power_sums(const ReluTapArgs& args, int64_t n, double* q, Bump bump, const P& power) {
  const Feature& x = args.x;
  const Feature& r = args.residual;
  const Feature& y = args.y.x;
  const bool in_place =
      x.layout == y.layout && y.layout != Layout::kGeneric && (!kSum || r.layout == y.layout);
  if (in_place) {
    const bool planes = y.layout == Layout::kPlanes;
    const int64_t x_stride = planes ? x.stride_c : x.stride_s;
    const int64_t r_stride = planes ? r.stride_c : r.stride_s;
    const int64_t y_stride = planes ? y.stride_c : y.stride_s;
    const int64_t rows = planes ? y.channels : y.positions;
    const int64_t count = planes ? y.positions : y.channels;
    // Whole groups, so that sums do not depend on the division; shorter runs than a vector are summed in
    // another way, all at once.
    const int64_t group = planes ? kStreams : kLanes<A>;
    const int64_t step = count < kLanes<A> ? rows : round_up(1 + kPiece / count, group);
    const T* x_row = static_cast<const T*>(x.data) + n * x.stride_n;
    const T* r_row = kSum ? static_cast<const T*>(r.data) + n * r.stride_n : nullptr;
    T* y_row = static_cast<T*>(y.data) + n * y.stride_n;
    A* block = take<A>(bump, y.positions);
    for (int64_t i = 0; i < rows; i += step) {
      const int64_t some = min_of(step, rows - i);
      T* to = y_row + i * y_stride;
      relu_rows<kSum, T, A>(x_row + i * x_stride, x_stride, kSum ? r_row + i * r_stride : nullptr, r_stride,
                            to, y_stride, some, count);
      if (planes) {
        power_sum_planes<T, A>(to, {i, some, rows}, y_stride, count, block, q, power);
      } else {
        power_sum_channels_last<T, A>(to, count, y_stride, some, q + i, power);
      }
    }
    return;
  }
  const int64_t positions = y.positions;
  A* block = take<A>(bump, positions);
  A* sums = take<A>(bump, args.y.chunk * positions);
  A* other = take<A>(bump, args.y.chunk * positions);
  T* rounded_sums = take<T>(bump, args.y.chunk * positions);
  for (int64_t c = 0; c < y.channels; c += args.y.chunk) {
    const int64_t end = min_of(c + args.y.chunk, y.channels);
    const int64_t count = (end - c) * positions;
    load_planes(x, n, c, end, sums);
    if constexpr (kSum) load_planes(r, n, c, end, other);
    relu_rows<kSum, A, A>(sums, count, other, count, sums, count, 1, count);
    convert_out<T, A>(sums, count, rounded_sums);
    convert_in<T, A>(rounded_sums, count, sums);
    store_planes(sums, y, n, c, end);
    power_sum_planes<A, A>(sums, {c, end - c, y.channels}, positions, positions, block, q, power);
  }
}

static void relu_tap(const ReluTapArgs& args, int64_t begin, int64_t end, void* scratch) {
  const int64_t count = args.y.x.positions;
  with_types(args.y.x.dtype, [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    for (int64_t n = begin; n < end; ++n) {
      Bump bump{static_cast<char*>(scratch)};
      double* q = take<double>(bump, count);
      with_power<A>(args.options, [&](const auto& power) {
        if (args.residual.data != nullptr) {
          relu_power_sums<true, T, A>(args, n, q, bump, power);
        } else {
          relu_power_sums<false, T, A>(args, n, q, bump, power);
        }
      });
      pad(q, count);
      const Norm norm = norm_of(q, count, args.y, args.options);
      static_cast<A*>(args.norm)[n] = static_cast<A>(norm.norm);
      write_normalized(q, count, norm, static_cast<A*>(args.map) + n * count);
    }
  });
}

// g + k * h(x); if kRelu, x is the result of a ReLU, and this is 0 where x is 0. A NaN lets the gradient
// pass, as in PyTorch.
template <bool kRelu, typename A, typename P>
FASTKD_INLINE Vec<A> tapped(Vec<A> x, Vec<A> g, Vec<A> k, const P& power) {
  const Vec<A> v = g + P::slope(power, x) * k;
  if constexpr (!kRelu) return v;
  return (Vec<A>)((Mask<A>)v & ~(Mask<A>)(x <= 0));
}
template <bool kRelu, typename A, typename P>
FASTKD_INLINE A tapped1(A x, A g, A k, const P& power) {
  const A v = g + P::slope1(power, x) * k;
  return kRelu && x <= 0 ? 0 : v;
}

// dx[c * dx_stride + s] from x[c * x_stride + s], g[c * g_stride + s] and k[s].
template <bool kRelu, typename T, typename A, typename P>
static void tap_planes(const T* x, int64_t x_stride, const T* g, int64_t g_stride, int64_t channels,
                       int64_t count, const A* k, T* dx, int64_t dx_stride, const P& power) {
  constexpr int64_t W = kLanes<A>;
  const auto step = [&](int64_t s) {
    store<T, A>(dx + s, tapped<kRelu, A>(load<T, A>(x + s), load<T, A>(g + s), load<A, A>(k + s), power));
  };
  for (int64_t c = 0; c < channels; ++c, x += x_stride, g += g_stride, dx += dx_stride) {
    if (count < W) {
      for (int64_t s = 0; s < count; ++s) {
        dx[s] = from_acc<T, A>(tapped1<kRelu, A>(to_acc<T, A>(x[s]), to_acc<T, A>(g[s]), k[s], power));
      }
      continue;
    }
    for (int64_t s = 0; s + W <= count; s += W) step(s);
    // The last vector overlaps the one before it: the same values again.
    if (count % W != 0) step(count - W);
  }
}

// dx[s * dx_stride + c] from x[s * x_stride + c], g[s * g_stride + c] and k[s].
template <bool kRelu, typename T, typename A, typename P>
static void tap_channels_last(const T* x, int64_t x_stride, const T* g, int64_t g_stride, int64_t channels,
                              int64_t count, const A* k, T* dx, int64_t dx_stride, const P& power) {
  constexpr int64_t W = kLanes<A>;
  for (int64_t s = 0; s < count; ++s, x += x_stride, g += g_stride, dx += dx_stride) {
    if (channels < W) {
      for (int64_t c = 0; c < channels; ++c) {
        dx[c] = from_acc<T, A>(tapped1<kRelu, A>(to_acc<T, A>(x[c]), to_acc<T, A>(g[c]), k[s], power));
      }
      continue;
    }
    const Vec<A> along = broadcast<A>(k[s]);
    const auto step = [&](int64_t c) {
      store<T, A>(dx + c, tapped<kRelu, A>(load<T, A>(x + c), load<T, A>(g + c), along, power));
    };
    for (int64_t c = 0; c + W <= channels; c += W) step(c);
    if (channels % W != 0) step(channels - W);
  }
}

template <bool kRelu, typename T, typename A, typename P>
static void tap_gradient(const TapBackwardArgs& args, int64_t n, const A* k, Bump bump, const P& power) {
  const AttentionSide& side = args.map.side;
  const Feature& x = side.x;
  const Feature& g = args.grad;
  const Feature& dx = args.map.dx;
  if (x.layout == dx.layout && x.layout == g.layout && x.layout != Layout::kGeneric) {
    const T* from = static_cast<const T*>(x.data) + n * x.stride_n;
    const T* with = static_cast<const T*>(g.data) + n * g.stride_n;
    T* to = static_cast<T*>(dx.data) + n * dx.stride_n;
    if (x.layout == Layout::kPlanes) {
      tap_planes<kRelu, T, A>(from, x.stride_c, with, g.stride_c, x.channels, x.positions, k, to, dx.stride_c,
                              power);
    } else {
      tap_channels_last<kRelu, T, A>(from, x.stride_s, with, g.stride_s, x.channels, x.positions, k, to,
                                     dx.stride_s, power);
    }
    return;
  }
  const int64_t positions = x.positions;
  A* planes = take<A>(bump, side.chunk * positions);
  A* other = take<A>(bump, side.chunk * positions);
  A* gradient = take<A>(bump, side.chunk * positions);
  for (int64_t c = 0; c < x.channels; c += side.chunk) {
    const int64_t end = min_of(c + side.chunk, x.channels);
    load_planes(x, n, c, end, planes);
    load_planes(g, n, c, end, other);
    tap_planes<kRelu, A, A>(planes, positions, other, positions, end - c, positions, k, gradient, positions,
                            power);
    store_planes(gradient, dx, n, c, end);
  }
}

static void tap_backward(const TapBackwardArgs& args, int64_t begin, int64_t end, void* scratch) {
  with_types(args.map.side.x.dtype, [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    for (int64_t n = begin; n < end; ++n) {
      Bump bump{static_cast<char*>(scratch)};
      const A* k = map_coefficients<A>(args.map, n, bump);
      with_power<A>(args.map.options, [&](const auto& power) {
        if (args.relu) {
          tap_gradient<true, T, A>(args, n, k, bump, power);
        } else {
          tap_gradient<false, T, A>(args, n, k, bump, power);
        }
      });
    }
  });
}

extern const TapKernels tap_kernels = {relu_tap, tap_backward};
