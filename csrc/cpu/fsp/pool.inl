// Average pooling for the FSP kernels, and its gradient, vectorized: along the rows for planes, over the
// channels for channels-last maps. (pool.inl has the general loop, which serves the rest.) Needs pack.inl.

// f(line, first input line, number of slices, number of lines a slice) for every line of windows: those of
// one depth and height.
template <typename F>
FASTKD_INLINE void for_lines(const PoolPlan& plan, const F& f) {
  int64_t line = 0;
  for (int64_t d = 0; d < plan.out[0]; ++d) {
    const int64_t d0 = plan.begin[0][d], depth = plan.end[0][d] - d0;
    for (int64_t h = 0; h < plan.out[1]; ++h, ++line)
      f(line, d0 * plan.in[1] + plan.begin[1][h], depth, plan.end[1][h] - plan.begin[1][h]);
  }
}

// Whether windows are 2x2 and lines whole vectors: the case of every CIFAR network, worth its own loops.
template <typename A>
FASTKD_INLINE bool is_quartered(const PoolPlan& plan) {
  return plan.in[0] == plan.out[0] && plan.in[1] == 2 * plan.out[1] && plan.in[2] == 2 * plan.out[2] &&
         plan.in[2] % kLanes<A> == 0 && plan.out_positions % kLanes<A> == 0;
}

// The upper of two lines, a vector at a time, in pairs of lines from the top of a plane.
template <typename T>
struct LinePairs {
  T* at;
  int64_t width, rest;
};
template <typename A, typename T>
FASTKD_INLINE T* next_vector(LinePairs<T>& lines) {
  T* at = lines.at;
  lines.at += kLanes<A>;
  lines.rest -= kLanes<A>;
  if (lines.rest == 0) {
    lines.rest = lines.width;
    lines.at += lines.width;
  }
  return at;
}

// v's and w's elements 0, 2, ... plus their right neighbours.
template <typename A>
FASTKD_INLINE Vec<A> neighbours(Vec<A> v, Vec<A> w) {
  Mask<A> even = {};
  for (int i = 0; i < int(kLanes<A>); ++i) even[i] = 2 * i;
  return FASTKD_SHUFFLE(v, w, even) + FASTKD_SHUFFLE(v, w, even + 1);
}

template <typename T, typename A>
static void average_quarters(const T* plane, const PoolPlan& plan, A* out) {
  constexpr int W = int(kLanes<A>);
  const int64_t width = plan.in[2];
  LinePairs<const T> lines = {plane, width, width};
  for (int64_t i = 0; i < plan.out_positions; i += W) {
    const T *left = next_vector<A>(lines), *right = next_vector<A>(lines);
    const Vec<A> l = load<T, A>(left) + load<T, A>(left + width),
                 r = load<T, A>(right) + load<T, A>(right + width);
    store<A, A>(out + i, neighbours<A>(l, r) * A(0.25));
  }
}

template <bool Add, typename A>
static void spread_quarters(const A* grad, const PoolPlan& plan, A* plane) {
  constexpr int W = int(kLanes<A>);
  Mask<A> twice = {};
  for (int i = 0; i < W; ++i) twice[i] = i / 2;
  const int64_t width = plan.in[2];
  LinePairs<A> lines = {plane, width, width};
  for (int64_t i = 0; i < plan.out_positions; i += W) {
    const Vec<A> share = load<A, A>(grad + i) * A(0.25);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const Vec<A> v = FASTKD_SHUFFLE(share, twice + half * (W / 2));
      A* to = next_vector<A>(lines);
      store<A, A>(to, Add ? load<A, A>(to) + v : v);
      store<A, A>(to + width, Add ? load<A, A>(to + width) + v : v);
    }
  }
}

// out[i] = x[2 i] + x[2 i + 1].
template <typename A>
FASTKD_INLINE void add_neighbours(const A* x, int64_t count, A* out) {
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>)
    store<A, A>(out + i, neighbours<A>(load<A, A>(x + 2 * i), load<A, A>(x + 2 * i + kLanes<A>)));
  for (; i < count; ++i) out[i] = x[2 * i] + x[2 * i + 1];
}

// out[c][position] with rows of `out_row`, from planes. `lines` holds a plane of plan.in: windows are
// averaged over depth and height first, then within the lines.
template <typename T, typename A>
static void average_planes(const T* x, int64_t stride_c, int64_t channels, const PoolPlan& plan,
                           A* __restrict lines, A* __restrict out, int64_t out_row) {
  const int64_t width = plan.in[2], slice = plan.in[1] * width, count = plan.out[0] * plan.out[1];
  const bool halves = width == 2 * plan.out[2], quarters = is_quartered<A>(plan);
  for (int64_t c = 0; c < channels; ++c, out += out_row) {
    if (quarters) {
      average_quarters<T, A>(x + c * stride_c, plan, out);
      continue;
    }
    for_lines(plan, [&](int64_t line, int64_t first, int64_t depth, int64_t height) {
      const T* from = x + c * stride_c + first * width;
      A* to = lines + line * width;
      const A share = A(1) / static_cast<A>(depth * height * (halves ? 2 : 1));
      const auto average = [&](int64_t w) {
        Vec<A> total = load<T, A>(from + w);
        if (depth == 1 && height == 2) {
          total += load<T, A>(from + width + w);
        } else {
          for (int64_t d = 0; d < depth; ++d) {
            for (int64_t h = d == 0 ? 1 : 0; h < height; ++h)
              total += load<T, A>(from + d * slice + h * width + w);
          }
        }
        store<A, A>(to + w, total * share);
      };
      int64_t w = 0;
      for (; w + kLanes<A> <= width; w += kLanes<A>) average(w);
      if (w < width && width >= kLanes<A>) {
        average(width - kLanes<A>);  // some of it twice
        w = width;
      }
      for (; w < width; ++w) {
        A total = 0;
        for (int64_t d = 0; d < depth; ++d) {
          for (int64_t h = 0; h < height; ++h) total += to_acc<T, A>(from[d * slice + h * width + w]);
        }
        to[w] = total * share;
      }
    });
    if (halves) {
      add_neighbours(lines, plan.out_positions, out);
      continue;
    }
    for (int64_t line = 0; line < count; ++line) {
      for (int64_t w = 0; w < plan.out[2]; ++w) {
        const int64_t begin = plan.begin[2][w], end = plan.end[2][w];
        A total = 0;
        for (int64_t i = begin; i < end; ++i) total += lines[line * width + i];
        out[line * plan.out[2] + w] = total / static_cast<A>(end - begin);
      }
    }
  }
}

// The gradient: to = or += what average_planes() makes of to's planes, transposed.
template <bool Add, typename A>
static void spread_planes(const A* __restrict grad, int64_t channels, const PoolPlan& plan,
                          A* __restrict lines, A* to, int64_t to_row) {
  const int64_t width = plan.in[2], slice = plan.in[1] * width, count = plan.out[0] * plan.out[1];
  const bool halves = width == 2 * plan.out[2], quarters = is_quartered<A>(plan);
  for (int64_t c = 0; c < channels; ++c, grad += plan.out_positions) {
    if (quarters) {
      spread_quarters<Add, A>(grad, plan, to + c * to_row);
      continue;
    }
    if (halves) {
      for (int64_t i = 0; i < plan.out_positions; ++i) lines[2 * i] = lines[2 * i + 1] = grad[i];
    } else {
      for (int64_t i = 0; i < count * width; ++i) lines[i] = 0;
      for (int64_t line = 0; line < count; ++line) {
        for (int64_t w = 0; w < plan.out[2]; ++w) {
          const int64_t begin = plan.begin[2][w], end = plan.end[2][w];
          const A share = grad[line * plan.out[2] + w] / static_cast<A>(end - begin);
          for (int64_t i = begin; i < end; ++i) lines[line * width + i] += share;
        }
      }
    }
    for_lines(plan, [&](int64_t line, int64_t first, int64_t depth, int64_t height) {
      const A* from = lines + line * width;
      const A share = A(1) / static_cast<A>(depth * height * (halves ? 2 : 1));
      for (int64_t d = 0; d < depth; ++d) {
        for (int64_t h = 0; h < height; ++h) {
          A* target = to + c * to_row + first * width + d * slice + h * width;
          int64_t w = 0;
          for (; w + kLanes<A> <= width; w += kLanes<A>) {
            const Vec<A> term = load<A, A>(from + w) * share;
            store<A, A>(target + w, Add ? load<A, A>(target + w) + term : term);
          }
          for (; w < width; ++w) target[w] = Add ? target[w] + from[w] * share : from[w] * share;
        }
      }
    });
  }
}

FASTKD_INLINE bool is_2x2(const Window& v) {
  return v.d1 - v.d0 == 1 && v.h1 - v.h0 == 2 && v.w1 - v.w0 == 2;
}

// out[position][c] with rows of `out_row`, from a channels-last map.
template <typename T, typename A>
static void average_positions(const T* x, int64_t stride_s, int64_t channels, const PoolPlan& plan, A* out,
                              int64_t out_row) {
  const int64_t line = plan.in[2] * stride_s;
  for_windows(plan, [&](int64_t at, const Window& window) {
    A* to = out + at * out_row;
    const A share = A(1) / static_cast<A>(volume(window));
    int64_t c = 0;
    if (is_2x2(window)) {
      const T* from = x + ((window.d0 * plan.in[1] + window.h0) * plan.in[2] + window.w0) * stride_s;
      for (; c + kLanes<A> <= channels; c += kLanes<A>) {
        const Vec<A> upper = load<T, A>(from + c) + load<T, A>(from + stride_s + c);
        const Vec<A> lower = load<T, A>(from + line + c) + load<T, A>(from + line + stride_s + c);
        store<A, A>(to + c, (upper + lower) * share);
      }
    }
    for (; c + kLanes<A> <= channels; c += kLanes<A>) {
      Vec<A> total = {};
      for_positions(plan, window, [&](int64_t s) { total += load<T, A>(x + s * stride_s + c); });
      store<A, A>(to + c, total * share);
    }
    for (; c < channels; ++c) {
      A total = 0;
      for_positions(plan, window, [&](int64_t s) { total += to_acc<T, A>(x[s * stride_s + c]); });
      to[c] = total * share;
    }
    for (; c < out_row; ++c) to[c] = 0;
  });
}

template <bool Add, typename A>
static void spread_positions(const A* grad, int64_t grad_row, int64_t channels, const PoolPlan& plan, A* to,
                             int64_t to_row) {
  for_windows(plan, [&](int64_t at, const Window& window) {
    const A* from = grad + at * grad_row;
    const A share = A(1) / static_cast<A>(volume(window));
    for_positions(plan, window, [&](int64_t s) {
      A* target = to + s * to_row;
      int64_t c = 0;
      for (; c + kLanes<A> <= channels; c += kLanes<A>) {
        const Vec<A> term = load<A, A>(from + c) * share;
        store<A, A>(target + c, Add ? load<A, A>(target + c) + term : term);
      }
      for (; c < channels; ++c) target[c] = Add ? target[c] + from[c] * share : from[c] * share;
    });
  });
}

// Whether every input position lies in exactly one window, so that a gradient can be written without clearing
// first.
FASTKD_INLINE bool tiles_exactly(const PoolPlan& plan) {
  return plan.in[0] % plan.out[0] == 0 && plan.in[1] % plan.out[1] == 0 && plan.in[2] % plan.out[2] == 0;
}

// The distance of averaged planes: not a power of two, at which they would compete for the same lines of the
// first-level cache.
FASTKD_INLINE int64_t averages_row(const PoolPlan& plan) { return plan.out_positions + kPad; }

// Elements of scratch memory that operand_block() fills for one operand, and of its line of working memory.
FASTKD_INLINE int64_t pooled_elements(const FspOperand& x, int64_t channels) {
  return x.pool.active ? round_up(channels, kPad) * averages_row(x.pool) : 0;
}
FASTKD_INLINE int64_t plane_elements(const FspOperand& x) { return x.pool.active ? x.pool.in_positions : 0; }

// The operand's channels from c on as its pair sees them: in place, or pooled into `out` (of type A then;
// channels-last maps stay so).
template <typename A>
static Block operand_block(const FspOperand& operand, int64_t n, int64_t c, int64_t channels, A* plane,
                           A* out) {
  const Feature& x = operand.x;
  const PoolPlan& plan = operand.pool;
  Block from = sample_block(x, n, c);
  if (!plan.active) return from;
  Block to = {out,
              sizeof(A) == sizeof(double) ? DType::kDouble : DType::kFloat,
              Layout::kPlanes,
              plan.out_positions,
              1,
              {},
              {}};
  if (plan.max || x.layout == Layout::kGeneric) {
    load_pooled<A>(x, n, c, c + channels, plan, plane, out);
    return to;
  }
  with_type<A>(x.dtype, [&](auto t) {
    using T = decltype(t);
    const T* data = static_cast<const T*>(from.data);
    if (x.layout == Layout::kPlanes) {
      to.stride_c = averages_row(plan);
      average_planes<T, A>(data, x.stride_c, channels, plan, plane, out, to.stride_c);
    } else {
      to.layout = Layout::kChannelsLast;
      to.stride_c = 1;
      to.stride_s = round_up(channels, kPad);
      average_positions<T, A>(data, x.stride_s, channels, plan, out, to.stride_s);
    }
  });
  return to;
}
