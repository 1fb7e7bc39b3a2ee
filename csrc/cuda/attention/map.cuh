// The attention map and the gradient it sends, alone or as taps: one launch each. Forward: each block sums
// the powers of one unit, on its way past a ReLU if there is one, and the last of a sample normalizes the
// map. Backward: each block computes the <g, y> of its sample itself. For 56x56 positions that reads 25 KiB
// from the second-level cache, where the block streams two or three times up to 128 KiB.
#pragma once

#include "cuda/attention/power_sum.cuh"
#include "cuda/attention/gradient.cuh"

namespace fastkd {

struct MapArgs {
  Place x;
  MatrixView view;
  Relu relu;
  void* sums;         // view.parts * positions numbers a sample
  void* map;          // (N, positions)
  void* norm;         // (N), if normalize
  unsigned* tickets;  // [sample]
  double eps;
  int32_t normalize, mean, add_eps;
};

template <bool kRelu, typename A>
FASTKD_KERNEL_OF(kThreads, (kBlocks<A, kRelu>))
map_kernel(const MapArgs args) {
  const MatrixView& w = args.view;
  const int32_t sample = quotient_down(static_cast<int32_t>(blockIdx.x), w.units);
  const int32_t positions = positions_of(w);
  const int64_t n = sample;
  A* sums = static_cast<A*>(args.sums) + n * w.parts * positions;
  power_sums<kRelu, false>(w, args.x, &args.relu, n, static_cast<int32_t>(blockIdx.x) - sample * w.units,
                           shared_numbers<A>(), sums);
  if (!is_last(args.tickets + n, static_cast<unsigned>(w.units))) return;

  // each thread has the same positions in both passes
  A* q = positions <= kTile ? shared_numbers<A>() : sums;
  double squares[1] = {collapse(sums, w.parts, positions, q)};
  const double share = reduction_of(w, args.mean);
  Norm norm = no_norm(share);
  if (args.normalize) {
    block_sums(squares, 0);
    norm = norm_from(sqrt(squares[0]) / share, share, args.eps, args.add_eps);
    if (threadIdx.x == 0) static_cast<A*>(args.norm)[n] = static_cast<A>(norm.norm);
  }
  for (int32_t s = threadIdx.x; s < positions; s += kThreads)
    static_cast<A*>(args.map)[n * positions + s] = normalized(q[s], norm);
}

// A map (N, *S) of any strides.
struct MapPlace {
  const void* data;
  int64_t stride_n;
  int64_t stride[3];
  int32_t is_run;  // its positions follow each other, which saves two divisions a number
};

struct MapGradientArgs {
  Place x, dx;
  Tap tap;
  MatrixView view;
  MapPlace grad, map;
  const void* norm;
  int64_t norm_stride;
  double eps;
  int32_t normalize, mean, add_eps;
};

template <typename A>
FASTKD_DEVICE double number_of(const MatrixView& w, const MapPlace& map, int64_t n, int32_t s) {
  return static_cast<const A*>(
      map.data)[n * map.stride_n + (map.is_run ? s : spatial_offset(w.size, map.stride, s))];
}

template <bool kTap, typename A>
FASTKD_KERNEL_OF(kThreads, (kBlocks<A, kTap>))
map_gradient_kernel(const MapGradientArgs args) {
  const MatrixView& w = args.view;
  // what the forward pass has read last may still be in the second-level cache
  const int32_t block = static_cast<int32_t>(gridDim.x - 1 - blockIdx.x);
  const int32_t sample = quotient_down(block, w.units);
  const int64_t n = sample;
  const Part part = part_of(w, block - sample * w.units);
  const double share = reduction_of(w, args.mean);
  Norm norm = no_norm(1);
  double dot[1] = {};
  if (args.normalize) {
    norm = norm_from(static_cast<const A*>(args.norm)[n * args.norm_stride], share, args.eps, args.add_eps);
    for (int32_t s = threadIdx.x; s < positions_of(w); s += kThreads) {
      dot[0] += number_of<A>(w, args.grad, n, s) * number_of<A>(w, args.map, n, s);
    }
    block_sums(dot, 0);
  }
  A* k = shared_numbers<A>();
  FASTKD_ROLLED
  for (int32_t j = threadIdx.x; j < coefficients_of(w, part); j += kThreads) {
    const int32_t s = position_of(w, first_coefficient(w, part) + j);
    const double y = number_of<A>(w, args.map, n, s);
    k[j] = static_cast<A>(along_gradient(number_of<A>(w, args.grad, n, s), y, dot[0], norm, 2 / share));
  }
  sync_block();
  stream<kTap, false, A>(w, args.x, args.dx, &args.tap, n, part, SharedCoefficients<A>{k});
}

}  // namespace fastkd
