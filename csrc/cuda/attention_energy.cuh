// The energies of a unit, the sums over its rows (by columns) or columns (by rows) of x^2: what a feature's one reading is for.
#pragma once

#include "cuda/attention_walk.cuh"

namespace fastkd {

// One pass of the network over the same numbers: y = relu(x + residual), of which the energies then are.
struct Relu {
  Place residual;  // data is null if there is none
  Place y;
};

// y in place of x: rounded once the sum is made, once more by nothing. A NaN stays, as in PyTorch.
template <typename T, typename A, int W>
FASTKD_DEVICE void rectify(Pack& x, const Pack& residual, bool has_residual) {
  FASTKD_UNROLL
  for (int i = 0; i < W; ++i) {
    A v = wide<A>(get<T>(x, i));
    if (has_residual) v += wide<A>(get<T>(residual, i));
    set<T>(x, i, narrow<T>(v < 0 ? A(0) : v));
  }
}

// Reads kUnroll rows, `step` rows apart, of which those before `end` exist; the others are zeros.
template <typename T, int W>
FASTKD_DEVICE void load_rows(const T* at, int64_t stride_row, int32_t row, int32_t step, int32_t end, Pack (&v)[kUnroll]) {
  FASTKD_UNROLL
  for (int u = 0; u < kUnroll; ++u) {
    v[u] = Pack{};
    if (row + u * step < end) v[u] = load_some<T, W>(at + u * step * stride_row);
  }
}

// The rows' numbers, those of y where there is a ReLU, which are written on the way. `column` is where at stands in its row.
template <bool kRelu, typename T, typename A, int W>
FASTKD_DEVICE void take_rows(const Walk& w, const Place& x, const Relu* relu, int64_t n, int32_t row, int32_t step, int32_t end,
                             int32_t column, const T* at, Pack (&v)[kUnroll]) {
  load_rows<T, W>(at, x.stride_row, row, step, end, v);
  if constexpr (kRelu) {
    Pack residual[kUnroll] = {};
    const bool has_residual = relu->residual.data != nullptr;
    if (has_residual) {
      load_rows<T, W>(row_of<T>(w, relu->residual, n, row, column), relu->residual.stride_row, row, step, end, residual);
    }
    T* y = row_of<T>(w, relu->y, n, row, column);
    FASTKD_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      rectify<T, A, W>(v[u], residual[u], has_residual);
      if (row + u * step < end) store_some<T, W>(y + u * step * relu->y.stride_row, v[u]);
    }
  }
}

// out[column] for the unit's columns. `sums` is shared memory for kThreads * W numbers.
template <bool kRelu, typename T, typename A, int W>
FASTKD_DEVICE void energies_by_columns(const Walk& w, const Place& x, const Relu* relu, int64_t n, const Part& part, A* sums, A* out) {
  const int across = w.across, groups = kThreads / across;
  const int p = static_cast<int>(threadIdx.x) % across, group = static_cast<int>(threadIdx.x) / across;
  if (group < groups && p * W < part.columns) {
    A total[W] = {};
    const int32_t column = part.first_column + p * W;
    const T* at = row_of<const T>(w, x, n, part.first_row + group, column);
    for (int32_t row = part.first_row + group; row < part.end_row; row += kUnroll * groups) {
      Pack v[kUnroll];
      take_rows<kRelu, T, A, W>(w, x, relu, n, row, groups, part.end_row, column, at, v);
      at += kUnroll * groups * x.stride_row;
      FASTKD_UNROLL
      for (int i = 0; i < W; ++i) {
        A e[kUnroll];
        FASTKD_UNROLL
        for (int u = 0; u < kUnroll; ++u) {
          const A number = wide<A>(get<T>(v[u], i));
          e[u] = number * number;
        }
        total[i] += (e[0] + e[1]) + (e[2] + e[3]);
      }
    }
    FASTKD_UNROLL
    for (int i = 0; i < W; ++i) sums[(group * across + p) * W + i] = total[i];
  }
  sync_block();
  for (int32_t j = threadIdx.x; j < part.columns; j += kThreads) {
    A total = sums[j];
    for (int i = 1; i < groups; ++i) total += sums[i * across * W + j];
    out[part.first_column + j] = total;
  }
}

// out[row] for the unit's rows. All threads go round as often as any: lanes add up by shuffles.
template <bool kRelu, typename T, typename A, int W>
FASTKD_DEVICE void energies_by_rows(const Walk& w, const Place& x, const Relu* relu, int64_t n, const Part& part, A* out) {
  const int lanes = w.across, step = kThreads / lanes;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  int32_t row = part.first_row + static_cast<int>(threadIdx.x) / lanes;
  for (int32_t first = part.first_row; first < part.end_row; first += kUnroll * step, row += kUnroll * step) {
    A total[kUnroll] = {};
    for (int32_t c = lane * W; c < w.columns; c += lanes * W) {
      Pack v[kUnroll];
      take_rows<kRelu, T, A, W>(w, x, relu, n, row, step, part.end_row, c, row_of<const T>(w, x, n, row, c), v);
      FASTKD_UNROLL
      for (int u = 0; u < kUnroll; ++u) {
        A e = 0;
        FASTKD_UNROLL
        for (int i = 0; i < W; ++i) {
          const A number = wide<A>(get<T>(v[u], i));
          e += number * number;
        }
        total[u] += e;
      }
    }
    for (int mask = lanes / 2; mask > 0; mask /= 2) {
      FASTKD_UNROLL
      for (int u = 0; u < kUnroll; ++u) total[u] += shuffle_xor(total[u], mask);
    }
    FASTKD_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      if (lane == 0 && row + u * step < part.end_row) out[row + u * step] = total[u];
    }
  }
}

// A unit's sums into `out`, which has parts_of(w) of them for each position of the sample. All threads of the block must come.
template <bool kRelu, typename A>
FASTKD_DEVICE void energies(const Walk& w, const Place& x, const Relu* relu, int64_t n, int32_t unit, A* sums, A* out) {
  const Part part = part_of(w, unit);
  with_format<A>(w, [&](auto format) {
    using T = typename decltype(format)::Number;
    constexpr int W = decltype(format)::kWidth;
    if (w.by_rows) {
      energies_by_rows<kRelu, T, A, W>(w, x, relu, n, part, out);
    } else {
      energies_by_columns<kRelu, T, A, W>(w, x, relu, n, part, sums, out + static_cast<int64_t>(unit / w.tiles) * w.columns);
    }
  });
}

}  // namespace fastkd
