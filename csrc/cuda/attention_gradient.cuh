// dx = k x for a coefficient k of each position: how a unit's gradient is streamed. Taps add what else arrives, g, and gate by a ReLU; the
// sum is rounded once.
#pragma once

#include "cuda/attention_norm.cuh"

namespace fastkd {

// What a tap adds.
struct Tap {
  Place grad;    // data is null if nothing else arrives
  int32_t relu;  // x is a ReLU's result: no gradient where it is zero, a NaN lets pass, as in PyTorch
};

// Coefficients of a unit, in shared memory, are those of its columns, or of its rows where a walk goes by rows.
FASTKD_BOTH int32_t first_coefficient(const Walk& w, const Part& part) { return w.by_rows ? part.first_row : part.first_column; }
FASTKD_BOTH int32_t coefficients_of(const Walk& w, const Part& part) { return w.by_rows ? part.end_row - part.first_row : part.columns; }
FASTKD_BOTH int32_t position_of(const Walk& w, int32_t place) { return w.fold > 1 ? place % (w.columns / w.fold) : place; }

template <bool kTap, typename T, typename A, int W, typename F>
FASTKD_DEVICE Pack gradient_of(Pack x, const Pack& grad, bool has_x, bool has_grad, bool relu, const F& coefficient) {
  Pack out{};
  FASTKD_UNROLL
  for (int i = 0; i < W; ++i) {
    const A v = wide<A>(get<T>(x, i));
    A dx = has_x ? v * coefficient(i) : coefficient(i);
    if constexpr (kTap) {
      if (has_grad) dx = wide<A>(get<T>(grad, i)) + dx;
      if (relu && v <= 0) dx = 0;
    }
    set<T>(out, i, narrow<T>(dx));
  }
  return out;
}

// kUnroll rows of one thread, `step` apart. coefficient(u, i): of number i in row u of them.
template <bool kTap, typename T, typename A, int W, typename F>
FASTKD_DEVICE void stream_rows(const Walk& w, const Place& x, const Place& dx, const Tap* tap, int64_t n, int32_t row, int32_t step,
                               int32_t end, int32_t column, const F& coefficient) {
  const bool has_x = x.data != nullptr, has_grad = kTap && tap->grad.data != nullptr, relu = kTap && tap->relu;
  Pack v[kUnroll] = {}, grad[kUnroll] = {};
  FASTKD_UNROLL
  for (int u = 0; u < kUnroll; ++u) {
    if (has_x && row + u * step < end) v[u] = load_some<T, W>(row_of<const T>(w, x, n, row + u * step, column));
    if constexpr (kTap) {
      if (has_grad && row + u * step < end) grad[u] = load_some<T, W>(row_of<const T>(w, tap->grad, n, row + u * step, column));
    }
  }
  FASTKD_UNROLL
  for (int u = 0; u < kUnroll; ++u) {
    if (row + u * step < end) {
      store_some<T, W>(row_of<T>(w, dx, n, row + u * step, column),
                       gradient_of<kTap, T, A, W>(v[u], grad[u], has_x, has_grad, relu, [&](int i) { return coefficient(u, i); }));
    }
  }
}

// k: coefficients_of() numbers of shared memory, complete.
template <bool kTap, typename A>
FASTKD_DEVICE void stream(const Walk& w, const Place& x, const Place& dx, const Tap* tap, int64_t n, const Part& part, const A* k) {
  with_format<A>(w, [&](auto format) {
    using T = typename decltype(format)::Number;
    constexpr int W = decltype(format)::kWidth;
    const int across = w.across, step = kThreads / across;
    const int p = static_cast<int>(threadIdx.x) % across, group = static_cast<int>(threadIdx.x) / across;
    if (w.by_rows) {
      for (int32_t row = part.first_row + group; row < part.end_row; row += kUnroll * step) {
        A mine[kUnroll];
        FASTKD_UNROLL
        for (int u = 0; u < kUnroll; ++u) mine[u] = row + u * step < part.end_row ? k[row + u * step - part.first_row] : A(0);
        for (int32_t c = p * W; c < w.columns; c += across * W) {
          stream_rows<kTap, T, A, W>(w, x, dx, tap, n, row, step, part.end_row, c, [&](int u, int) { return mine[u]; });
        }
      }
    } else if (group < step && p * W < part.columns) {
      A mine[W];
      FASTKD_UNROLL
      for (int i = 0; i < W; ++i) mine[i] = k[p * W + i];
      for (int32_t row = part.first_row + group; row < part.end_row; row += kUnroll * step) {
        stream_rows<kTap, T, A, W>(w, x, dx, tap, n, row, step, part.end_row, part.first_column + p * W,
                                   [&](int, int i) { return mine[i]; });
      }
    }
  });
}

// The backward pass of the loss: dx = upstream * coefficient * x of all stages in one launch.

constexpr int kMaxItems = 24;

struct GradientItem {
  Place x, dx;    // x.data is null for a map, whose gradient the coefficient is
  const void* k;  // (N, positions)
  Walk walk;
  int32_t first;  // block
};

struct GradientArgs {
  GradientItem items[kMaxItems];
  const void* grad;  // a number of grad_dtype; null: upstream
  double upstream;
  DType grad_dtype;
  int32_t count;
};
static_assert(sizeof(GradientArgs) <= 4096, "more than what a launch takes everywhere");

template <typename A>
FASTKD_KERNEL(kThreads)
gradient_kernel(const GradientArgs args) {
  int32_t i = 0;
  while (i + 1 < args.count && static_cast<int32_t>(blockIdx.x) >= args.items[i + 1].first) ++i;
  const GradientItem& item = args.items[i];
  const Walk& w = item.walk;
  const int32_t local = static_cast<int32_t>(blockIdx.x) - item.first;
  const int64_t n = local / w.units;
  const Part part = part_of(w, local % w.units);
  const A upstream = args.grad == nullptr ? static_cast<A>(args.upstream) : load_number<A>(args.grad, args.grad_dtype, 0);
  A* k = shared_numbers<A>();
  const A* from = static_cast<const A*>(item.k) + n * positions_of(w);
  for (int32_t j = threadIdx.x; j < coefficients_of(w, part); j += kThreads) {
    k[j] = from[position_of(w, first_coefficient(w, part) + j)] * upstream;
  }
  sync_block();
  stream<false>(w, item.x, item.dx, nullptr, n, part, k);
}

}  // namespace fastkd
