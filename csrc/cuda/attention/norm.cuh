// The normalization of a sample's map by the block that comes last to it, as in csrc/cpu/attention/norm.inl.
// Sums over positions are taken in double, in one order.
#pragma once

#include "cuda/attention/matrix_view.cuh"

namespace fastkd {

// Shared memory of all kernels here: kBlockSums sums over a block, each in its own place, and then kTile
// numbers.
constexpr int kBlockSums = 4, kMostSums = 3;
constexpr int kWarps = kThreads / kWarp;
constexpr size_t kSumBytes = sizeof(double) * kBlockSums * kMostSums * kWarps;
template <typename A>
constexpr size_t kSharedBytes = kSumBytes + kTile * sizeof(A);

FASTKD_DEVICE double* block_sums_place(int which) {
  return reinterpret_cast<double*>(shared_memory()) + which * kMostSums * kWarps;
}
template <typename A>
FASTKD_DEVICE A* shared_numbers() {
  return reinterpret_cast<A*>(shared_memory() + kSumBytes);
}

// The sums over a block of `v`, for all its threads. `which` of the places: not one that was used since the
// last barrier but one.
template <int K>
FASTKD_DEVICE void block_sums(double (&v)[K], int which) {
  static_assert(K <= kMostSums);
  double* place = block_sums_place(which);
  FASTKD_UNROLL
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    FASTKD_UNROLL
    for (int k = 0; k < K; ++k) v[k] += shuffle_xor(v[k], mask);
  }
  if (threadIdx.x % kWarp == 0) {
    FASTKD_UNROLL
    for (int k = 0; k < K; ++k) place[threadIdx.x / kWarp * K + k] = v[k];
  }
  sync_block();
  FASTKD_UNROLL
  for (int k = 0; k < K; ++k) {
    v[k] = 0;
    FASTKD_UNROLL
    for (int w = 0; w < kWarps; ++w) v[k] += place[w * K + k];
  }
}

// What the sums over channels are divided by.
FASTKD_DEVICE double reduction_of(const MatrixView& w, bool mean) {
  if (!mean) return 1;
  return w.by_rows ? w.columns : w.rows << w.fold_bits;
}

// How many positions of a map a thread sums up at once. The last block of a sample is waited for, and it
// waits for each load that is not started beside others.
constexpr int kAtOnce = 4;

// Adds up each position's sums, which other blocks have just written, in their order, and in double: there
// may be hundreds. Writes those of this thread, its index and every kThreads on, to q, which may be `sums`,
// and returns the sum of their squares.
template <typename A>
FASTKD_DEVICE double collapse(const A* sums, int32_t parts, int32_t positions, A* q) {
  double squares = 0;
  FASTKD_ROLLED
  for (int32_t first = threadIdx.x; first < positions; first += kAtOnce * kThreads) {
    double total[kAtOnce] = {};
    FASTKD_ROLLED
    for (int32_t part = 0; part < parts; ++part) {
      const A* from = sums + static_cast<int64_t>(part) * positions + first;
      A one[kAtOnce];
      FASTKD_UNROLL
      for (int i = 0; i < kAtOnce; ++i)  // beyond the last position it reads the first of its own again
        one[i] = load_fresh(from + (first + i * kThreads < positions ? i * kThreads : 0));
      FASTKD_UNROLL
      for (int i = 0; i < kAtOnce; ++i) total[i] += one[i];
    }
    FASTKD_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      const int32_t s = first + i * kThreads;
      if (s >= positions) break;
      const A number = static_cast<A>(total[i]);
      q[s] = number;
      squares += static_cast<double>(number) * number;
    }
  }
  return squares;
}

// y of the sum q, rounded: equal maps then have equal y and no distance, however the compiler contracts what
// follows.
FASTKD_DEVICE float normalized(float q, const Norm& norm) { return static_cast<float>(q * norm.reciprocal); }
FASTKD_DEVICE double normalized(double q, const Norm& norm) { return q / norm.divisor; }

// The Norm of a map that is divided by nothing but the number of channels.
FASTKD_DEVICE Norm no_norm(double reduction) { return {0, reduction, 1 / reduction, 1, 0, false}; }

// factor * dq, for the gradient g of y; dot = <g, y>.
FASTKD_DEVICE double along_gradient(double g, double y, double dot, const Norm& norm, double factor) {
  const double along = norm.has_along ? y * (norm.along * dot) : 0;
  return (g - along) * (factor * norm.scale);
}

}  // namespace fastkd
