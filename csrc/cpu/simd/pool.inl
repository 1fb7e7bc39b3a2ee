// One sample's channels [c0, c1) as dense planes of the accumulation type A in scratch memory, whatever the
// tensor's dtype and strides, and adaptive pooling of such planes. Needs vec.inl.
//
//   load_planes(x, n, c0, c1, out): out[(c - c0) * positions + s] = x[n, c, s].
//
//   store_planes(in, x, n, c0, c1): the reverse, rounding to x's dtype.
//
//   pool_planes(in, count, plan, out): `count` planes of plan.in to planes of plan.out, as PyTorch's
//   adaptive_avg_pool and adaptive_max_pool.
//
//   unpool_planes_add(in, count, plan, grad, out): out += the gradient of pool_planes for the output gradient
//   `grad`; `in` is read by max pooling only.
//
//   load_pooled(x, n, c0, c1, plan, plane, out): load_planes and pool_planes, one plane at a time, for which
//   `plane` is scratch memory; load_planes alone if the plan is not active.

template <typename T, typename A>
static void load_planes_of(const Feature& x, int64_t n, int64_t c0, int64_t c1, A* out) {
  const T* base = static_cast<const T*>(x.data) + n * x.stride_n;
  if (x.layout == Layout::kPlanes) {
    for (int64_t c = c0; c < c1; ++c)
      convert_in<T, A>(base + c * x.stride_c, x.positions, out + (c - c0) * x.positions);
    return;
  }
  // Channels innermost where they lie together: each cache line is then used at once.
  const bool channels_inner = x.stride_c == 1;
  for (int64_t outer = channels_inner ? c1 - 1 : c0; outer < c1; ++outer) {
    int64_t s = 0;
    for (int64_t d = 0; d < x.size[0]; ++d) {
      for (int64_t h = 0; h < x.size[1]; ++h) {
        const T* row = base + d * x.stride[0] + h * x.stride[1];
        for (int64_t w = 0; w < x.size[2]; ++w, ++s) {
          const T* p = row + w * x.stride[2];
          if (channels_inner) {
            for (int64_t c = c0; c < c1; ++c) out[(c - c0) * x.positions + s] = to_acc<T, A>(p[c]);
          } else {
            out[(outer - c0) * x.positions + s] = to_acc<T, A>(p[outer * x.stride_c]);
          }
        }
      }
    }
  }
}

template <typename T, typename A>
static void store_planes_of(const A* in, const Feature& x, int64_t n, int64_t c0, int64_t c1) {
  T* base = static_cast<T*>(x.data) + n * x.stride_n;
  if (x.layout == Layout::kPlanes) {
    for (int64_t c = c0; c < c1; ++c)
      convert_out<T, A>(in + (c - c0) * x.positions, x.positions, base + c * x.stride_c);
    return;
  }
  const bool channels_inner = x.stride_c == 1;
  for (int64_t outer = channels_inner ? c1 - 1 : c0; outer < c1; ++outer) {
    int64_t s = 0;
    for (int64_t d = 0; d < x.size[0]; ++d) {
      for (int64_t h = 0; h < x.size[1]; ++h) {
        T* row = base + d * x.stride[0] + h * x.stride[1];
        for (int64_t w = 0; w < x.size[2]; ++w, ++s) {
          T* p = row + w * x.stride[2];
          if (channels_inner) {
            for (int64_t c = c0; c < c1; ++c) p[c] = from_acc<T, A>(in[(c - c0) * x.positions + s]);
          } else {
            p[outer * x.stride_c] = from_acc<T, A>(in[(outer - c0) * x.positions + s]);
          }
        }
      }
    }
  }
}

template <typename A>
static void load_planes(const Feature& x, int64_t n, int64_t c0, int64_t c1, A* out) {
  with_type<A>(x.dtype, [&](auto t) { load_planes_of<decltype(t), A>(x, n, c0, c1, out); });
}

template <typename A>
static void store_planes(const A* in, const Feature& x, int64_t n, int64_t c0, int64_t c1) {
  with_type<A>(x.dtype, [&](auto t) { store_planes_of<decltype(t), A>(in, x, n, c0, c1); });
}

// The window of an output position: from d0 to before d1, and so on.
struct Window {
  int64_t d0, d1, h0, h1, w0, w1;
};

// f(output position, window), in order.
template <typename F>
FASTKD_INLINE void for_windows(const PoolPlan& plan, const F& f) {
  int64_t at = 0;
  for (int64_t d = 0; d < plan.out[0]; ++d) {
    for (int64_t h = 0; h < plan.out[1]; ++h) {
      for (int64_t w = 0; w < plan.out[2]; ++w, ++at) {
        f(at, Window{plan.begin[0][d], plan.end[0][d], plan.begin[1][h], plan.end[1][h], plan.begin[2][w],
                     plan.end[2][w]});
      }
    }
  }
}

// f(input position) over a window, in memory order.
template <typename F>
FASTKD_INLINE void for_positions(const PoolPlan& plan, const Window& window, const F& f) {
  for (int64_t d = window.d0; d < window.d1; ++d) {
    for (int64_t h = window.h0; h < window.h1; ++h) {
      const int64_t row = (d * plan.in[1] + h) * plan.in[2];
      for (int64_t w = window.w0; w < window.w1; ++w) f(row + w);
    }
  }
}

FASTKD_INLINE int64_t volume(const Window& v) { return (v.d1 - v.d0) * (v.h1 - v.h0) * (v.w1 - v.w0); }

// The position of the maximum as PyTorch picks it: the first of equal ones; a NaN is larger than anything.
template <typename A>
FASTKD_INLINE int64_t argmax(const A* in, const PoolPlan& plan, const Window& window) {
  int64_t best = (window.d0 * plan.in[1] + window.h0) * plan.in[2] + window.w0;
  A value = in[best];
  for_positions(plan, window, [&](int64_t s) {
    if (in[s] > value || in[s] != in[s]) {
      value = in[s];
      best = s;
    }
  });
  return best;
}

template <typename A>
static void pool_planes(const A* in, int64_t count, const PoolPlan& plan, A* out) {
  for (int64_t i = 0; i < count; ++i, in += plan.in_positions, out += plan.out_positions) {
    for_windows(plan, [&](int64_t at, const Window& window) {
      if (plan.max) {
        out[at] = in[argmax(in, plan, window)];
      } else {
        A total = 0;
        for_positions(plan, window, [&](int64_t s) { total += in[s]; });
        out[at] = total / static_cast<A>(volume(window));
      }
    });
  }
}

template <typename In, typename A>
static void unpool_planes_add(const In* in, int64_t count, const PoolPlan& plan, const A* grad, A* out) {
  for (int64_t i = 0; i < count;
       ++i, in += plan.in_positions, grad += plan.out_positions, out += plan.in_positions) {
    for_windows(plan, [&](int64_t at, const Window& window) {
      if (plan.max) {
        out[argmax(in, plan, window)] += grad[at];
      } else {
        const A share = grad[at] / static_cast<A>(volume(window));
        for_positions(plan, window, [&](int64_t s) { out[s] += share; });
      }
    });
  }
}

template <typename A>
static void load_pooled(const Feature& x, int64_t n, int64_t c0, int64_t c1, const PoolPlan& plan, A* plane,
                        A* out) {
  if (!plan.active) return load_planes(x, n, c0, c1, out);
  for (int64_t c = c0; c < c1; ++c) {
    load_planes(x, n, c, c + 1, plane);
    pool_planes(plane, 1, plan, out + (c - c0) * plan.out_positions);
  }
}
