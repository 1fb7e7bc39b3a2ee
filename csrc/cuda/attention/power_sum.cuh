// The channel power sums of a unit: the sums over its rows (by columns) or columns (by rows) of x^2. For them
// a feature is read once.
#pragma once

#include "cuda/attention/matrix_view.cuh"

namespace fastkd {

// One pass of the network over the same numbers: y = relu(x + residual), whose power sums are then formed.
struct Relu {
  Place residual;  // data is null if there is none
  Place y;
};

// y in place of x, rounded once, after the sum. A NaN stays, as in PyTorch.
template <typename T, typename A, int W>
FASTKD_DEVICE void rectify(Pack& x, const Pack& residual, bool has_residual) {
  FASTKD_UNROLL
  for (int i = 0; i < W; ++i) {
    A v = wide<A>(get<T>(x, i));
    if (has_residual) v += wide<A>(get<T>(residual, i));
    set<T>(x, i, narrow<T>(v < 0 ? A(0) : v));
  }
}

// A thread's next packs, past the ReLU if there is one, whose result is written on the way.
template <bool kRelu, typename T, typename A, int W, int U>
FASTKD_DEVICE void take_packs(const MatrixView& w, const Place& x, const Relu* relu, const Part& part,
                              const Step& step, int64_t n, int32_t row, int32_t column, Pack (&v)[U]) {
  load_packs<T, W>(w, x, part, step, n, row, column, v);
  if constexpr (kRelu) {
    Pack residual[U] = {};
    const bool has_residual = relu->residual.data != nullptr;
    if (has_residual) load_packs<T, W>(w, relu->residual, part, step, n, row, column, residual);
    T* y = row_of<T, W>(w, relu->y, n, row, column);
    const int64_t distance = distance_of(w, relu->y, step);
    FASTKD_UNROLL
    for (int u = 0; u < U; ++u) {
      rectify<T, A, W>(v[u], residual[u], has_residual);
      if (is_within(part, step, row, column, u)) store_some<T, W>(y + u * distance, v[u]);
    }
  }
}

// How many packs a thread takes at once.
template <bool kRelu>
constexpr int kPacks = kRelu ? kUnrollTwo : kUnroll;

template <typename A, int U>
FASTKD_DEVICE A sum_of(const A (&e)[U]) {
  static_assert(U == 2 || U == 4);
  if constexpr (U == 2) return e[0] + e[1];
  return (e[0] + e[1]) + (e[U - 2] + e[U - 1]);
}

// out[column] for the unit's columns. `sums` is shared memory for kThreads * W numbers.
template <bool kRelu, typename T, typename A, int W>
FASTKD_DEVICE void power_sums_by_columns(const MatrixView& w, const Place& x, const Relu* relu, int64_t n,
                                         const Part& part, A* sums, A* out) {
  constexpr int U = kPacks<kRelu>;
  const int across = w.across, groups = w.groups;
  const Step step = {groups, 0};
  FASTKD_ROLLED
  for (int place = static_cast<int>(threadIdx.x); place < groups * across;
       place += kThreads) {  // once, where packs are read
    const int group = quotient_down(place, across), p = place - group * across;
    A total[W] = {};
    FASTKD_ROLLED
    for (int32_t row = part.first_row + group; row < part.end_row && p * W < part.columns;
         row += U * groups) {
      Pack v[U];
      take_packs<kRelu, T, A, W>(w, x, relu, part, step, n, row, part.first_column + p * W, v);
      FASTKD_UNROLL
      for (int i = 0; i < W; ++i) {
        A e[U];
        FASTKD_UNROLL
        for (int u = 0; u < U; ++u) {
          const A number = wide<A>(get<T>(v[u], i));
          e[u] = number * number;
        }
        total[i] += sum_of(e);
      }
    }
    FASTKD_UNROLL
    for (int i = 0; i < W; ++i) sums[place * W + i] = total[i];
  }
  sync_block();
  const int32_t length = w.tiles == 1 ? columns_of_sums(w) : part.columns;
  for (int32_t j = threadIdx.x; j < length; j += kThreads) {
    double total = 0;  // of up to a thousand numbers, where maps are small
    for (int i = 0; i < groups; ++i) {
      for (int32_t c = j; c < part.columns; c += length) total += sums[i * across * W + c];
    }
    out[part.first_column + j] = static_cast<A>(total);
  }
}

// out[row] for the unit's rows. All threads make equally many rounds, since lanes add up by shuffles.
template <bool kRelu, typename T, typename A, int W>
FASTKD_DEVICE void power_sums_by_rows(const MatrixView& w, const Place& x, const Relu* relu, int64_t n,
                                      const Part& part, A* out) {
  constexpr int U = kPacks<kRelu>;
  const int lanes = w.across, lane = lane_of_thread(w);
  const Step step = step_of(w), stride = stride_of(w, U);
  int32_t row = part.first_row + row_of_thread(w);
  FASTKD_ROLLED
  for (int32_t first = part.first_row; first < part.end_row; first += stride.rows, row += stride.rows) {
    A total[U] = {};
    FASTKD_ROLLED
    for (int32_t column = lane * W; column < w.columns; column += stride.columns) {
      Pack v[U];
      take_packs<kRelu, T, A, W>(w, x, relu, part, step, n, row, column, v);
      FASTKD_UNROLL
      for (int u = 0; u < U; ++u) {
        A e = 0;
        FASTKD_UNROLL
        for (int i = 0; i < W; ++i) {
          const A number = wide<A>(get<T>(v[u], i));
          e += number * number;
        }
        total[u] += e;
      }
    }
    if (step.rows == 0) total[0] = sum_of(total);
    for (int mask = lanes / 2; mask > 0; mask /= 2) {
      FASTKD_UNROLL
      for (int u = 0; u < U; ++u) total[u] += shuffle_xor(total[u], mask);
    }
    FASTKD_UNROLL
    for (int u = 0; u < U; ++u) {
      const int32_t at = row + u * step.rows;
      if (lane == 0 && at < part.end_row && (u == 0 || step.rows > 0)) out[at] = total[u];
    }
  }
}

// A unit's sums into `out`, which has w.parts of them for each position of the sample. All threads of the
// block must come.
template <bool kRelu, bool kMixed, typename A>
FASTKD_DEVICE void power_sums(const MatrixView& w, const Place& x, const Relu* relu, int64_t n, int32_t unit,
                              A* sums, A* out) {
  const Part part = part_of(w, unit);
  with_format<kMixed, A>(w, [&](auto format) {
    using T = typename decltype(format)::Number;
    constexpr int W = decltype(format)::kWidth;
    if (w.by_rows) {
      power_sums_by_rows<kRelu, T, A, W>(w, x, relu, n, part, out);
    } else {
      power_sums_by_columns<kRelu, T, A, W>(w, x, relu, n, part, sums,
                                            out + static_cast<int64_t>(part.chunk) * columns_of_sums(w));
    }
  });
}

}  // namespace fastkd
