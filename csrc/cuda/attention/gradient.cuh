// dx = k x for a coefficient k of each position: how a unit's gradient is streamed. Taps add what else
// arrives, g, and gate by a ReLU; the sum is rounded once.
#pragma once

#include "cuda/attention/norm.cuh"

namespace fastkd {

// What a tap adds.
struct Tap {
  Place grad;    // data is null if nothing else arrives
  int32_t relu;  // x is a ReLU's result: no gradient where it is 0; a NaN lets it pass, as in PyTorch
};

// Coefficients of a unit, in shared memory, are those of its columns, or of its rows where a view goes by
// rows.
FASTKD_BOTH int32_t first_coefficient(const MatrixView& w, const Part& part) {
  return w.by_rows ? part.first_row : part.first_column;
}
FASTKD_BOTH int32_t coefficients_of(const MatrixView& w, const Part& part) {
  return w.by_rows ? part.end_row - part.first_row : part.columns;
}
FASTKD_BOTH int32_t position_of(const MatrixView& w, int32_t place) {
  return w.fold_bits > 0 ? place % positions_of(w) : place;
}

template <bool kTap, typename T, typename A, int W, typename F>
FASTKD_DEVICE Pack gradient_of(Pack x, const Pack& grad, bool has_x, bool has_grad, bool relu,
                               const F& coefficient) {
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

// A thread's next packs. coefficient(u, i): of number i in pack u.
template <bool kTap, int U, typename T, typename A, int W, typename F>
FASTKD_DEVICE void stream_packs(const MatrixView& w, const Place& x, const Place& dx, const Tap* tap,
                                const Part& part, const Step& step, int64_t n, int32_t row, int32_t column,
                                const F& coefficient) {
  const bool has_x = x.data != nullptr, has_grad = kTap && tap->grad.data != nullptr,
             relu = kTap && tap->relu;
  Pack v[U] = {}, grad[U] = {};
  if (has_x) load_packs<T, W>(w, x, part, step, n, row, column, v);
  if constexpr (kTap) {
    if (has_grad) load_packs<T, W>(w, tap->grad, part, step, n, row, column, grad);
  }
  T* out = row_of<T, W>(w, dx, n, row, column);
  const int64_t distance = distance_of(w, dx, step);
  FASTKD_UNROLL
  for (int u = 0; u < U; ++u) {
    if (is_within(part, step, row, column, u)) {
      store_some<T, W>(out + u * distance,
                       gradient_of<kTap, T, A, W>(v[u], grad[u], has_x, has_grad, relu,
                                                  [&](int i) { return coefficient(u, i); }));
    }
  }
}

// Coefficients of a unit that lie in shared memory, complete.
template <typename A>
struct SharedCoefficients {
  const A* k;  // coefficients_of() numbers
  template <int W>
  FASTKD_MEMBER void read(int32_t place, A (&into)[W]) const {
    FASTKD_UNROLL
    for (int i = 0; i < W; ++i) into[i] = k[place + i];
  }
  FASTKD_MEMBER A scaled(A number) const { return number; }
};

// Coefficients of a sample that lie in global memory and are read where they are used. If the block first
// read them for all its threads, the features would wait for them. For the same reason `factor` comes last.
template <typename A>
struct Coefficients {
  const A* k;
  int32_t first, positions;  // the unit's first place, which in a folded row may lie beyond the last position
  A factor;
  template <int W>
  FASTKD_MEMBER void read(int32_t place, A (&into)[W]) const {
    int32_t s = first + place;
    if (s >= positions) s %= positions;
    FASTKD_UNROLL
    for (int i = 0; i < W; ++i) {
      into[i] = k[s];
      s = s + 1 == positions ? 0 : s + 1;
    }
  }
  FASTKD_MEMBER A scaled(A number) const { return number * factor; }
};

template <bool kTap, bool kMixed, typename A, typename K>
FASTKD_DEVICE void stream(const MatrixView& w, const Place& x, const Place& dx, const Tap* tap, int64_t n,
                          const Part& part, const K& k) {
  with_format<kMixed, A>(w, [&](auto format) {
    using T = typename decltype(format)::Number;
    constexpr int W = decltype(format)::kWidth, U = kTap ? kUnrollTwo : kUnroll;
    if (w.by_rows) {
      const int lane = lane_of_thread(w);
      const Step step = step_of(w), stride = stride_of(w, U);
      FASTKD_ROLLED
      for (int32_t row = part.first_row + row_of_thread(w); row < part.end_row; row += stride.rows) {
        A mine[U][1];
        FASTKD_UNROLL
        for (int u = 0; u < U; ++u) {
          const int32_t at = row + u * step.rows;
          k.read((at < part.end_row ? at : row) - part.first_row, mine[u]);
        }
        FASTKD_ROLLED
        for (int32_t column = lane * W; column < w.columns; column += stride.columns) {
          stream_packs<kTap, U, T, A, W>(w, x, dx, tap, part, step, n, row, column,
                                         [&](int u, int) { return k.scaled(mine[u][0]); });
        }
      }
      return;
    }
    const int across = w.across, groups = w.groups;
    const Step step = {groups, 0};
    FASTKD_ROLLED
    for (int place = static_cast<int>(threadIdx.x); place < groups * across;
         place += kThreads) {  // once, where packs are read
      const int group = quotient_down(place, across), p = place - group * across;
      if (p * W >= part.columns) continue;
      A mine[W];
      k.read(p * W, mine);
      FASTKD_ROLLED
      for (int32_t row = part.first_row + group; row < part.end_row; row += U * groups) {
        stream_packs<kTap, U, T, A, W>(w, x, dx, tap, part, step, n, row, part.first_column + p * W,
                                       [&](int, int i) { return k.scaled(mine[i]); });
      }
    }
  });
}

// The backward pass of the loss: dx = upstream * coefficient * x of all stages in one launch.

constexpr int kMaxItems = 24;

struct GradientItem {
  Place x, dx;    // x.data is null for a map, whose gradient the coefficient is
  const void* k;  // (N, positions)
  MatrixView view;
  int32_t first;  // block
};

struct GradientArgs {
  GradientItem items[kMaxItems];
  const void* grad;  // a number of grad_dtype; null: upstream
  double upstream;
  DType grad_dtype;
  int32_t count;
};
static_assert(sizeof(GradientArgs) <= 4096, "a kernel takes 4096 bytes of arguments at most");

template <typename A>
FASTKD_KERNEL_OF(kThreads, kBlocks<A>)
gradient_kernel(const GradientArgs args) {
  // what the forward pass has read last may still be in the second-level cache
  const int32_t block = static_cast<int32_t>(gridDim.x - 1 - blockIdx.x);
  int32_t i = 0;
  while (i + 1 < args.count && block >= args.items[i + 1].first) ++i;
  const GradientItem& item = args.items[i];
  const MatrixView& w = item.view;
  const int32_t local = block - item.first;
  const int32_t sample = quotient_down(local, w.units);
  const int64_t n = sample;
  const Part part = part_of(w, local - sample * w.units);
  const A upstream =
      args.grad == nullptr ? static_cast<A>(args.upstream) : load_number<A>(args.grad, args.grad_dtype, 0);
  const int32_t positions = positions_of(w);
  const Coefficients<A> k = {static_cast<const A*>(item.k) + n * positions, first_coefficient(w, part),
                             positions, upstream};
  stream<false, true, A>(w, item.x, item.dx, nullptr, n, part, k);
}

}  // namespace fastkd
