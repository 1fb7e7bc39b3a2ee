// What all operators of attention maps hand to the kernels: a feature, its scratch memory, its gradient.
#include "cpu/attention/sides.h"

#include "cpu/memory.h"

namespace fastkd {

// Numbers of a feature that are brought to scratch memory at a time, where it cannot be read as it lies: 64
// KiB of float. Channels come in groups of as many as kernels sum at once, unless their planes are larger
// than that.
constexpr int64_t kChunkElements = 16384, kChunkGroup = 8, kLargestGrouped = 65536;

AttentionSide side_of(const Feature& x, const PoolPlan& pool) {
  int64_t chunk = kChunkElements / x.positions;
  if (x.positions <= kLargestGrouped)
    chunk = chunk < kChunkGroup ? kChunkGroup : chunk / kChunkGroup * kChunkGroup;
  return {x, pool, chunk < 1 ? 1 : chunk < x.channels ? chunk : x.channels, nullptr};
}

size_t scratch_of(const AttentionSide& side, int64_t maps, bool in_place, DType accumulation) {
  const size_t size = static_cast<size_t>(size_of(accumulation));
  const size_t map = scratch_piece(side.x.positions, sizeof(double));
  const size_t chunks = in_place ? 0
                                 : map + 2 * scratch_piece(side.chunk * side.x.positions, size) +
                                       2 * scratch_piece(side.chunk * side.pool.out_positions, size);
  return static_cast<size_t>(maps + 1) * map + chunks;  // one more for the sums of a block of channels
}

AttentionMapBackwardArgs map_backward_args(const Tensor& grad, const TensorView& x, const Tensor& map,
                                           const Tensor& norm, const AttentionOptions& options,
                                           bool normalize, const Tensor& out) {
  const Feature feature = feature_of(x, "x");
  AttentionMapBackwardArgs args;
  args.side = side_of(feature, make_pool(feature.size, feature.size, false).plan);
  args.options = options;
  args.accumulation = accumulation(x.dtype, x.dtype);
  args.normalize = normalize;
  const TensorView grad_view = view_of(grad, "grad");
  check_accumulation(grad_view, args.accumulation, "grad");
  args.grad = map_of(grad_view, "grad");
  check_same(args.grad, feature, "grad and x");
  args.map = args.norm = args.grad;
  if (normalize) {
    const TensorView map_view = view_of(map, "map");
    const TensorView norm_view = view_of(norm, "norm");
    check_accumulation(map_view, args.accumulation, "map");
    check_accumulation(norm_view, args.accumulation, "norm");
    args.map = map_of(map_view, "map");
    check_same(args.map, feature, "map and x");
    STD_TORCH_CHECK(norm_view.dim == 1 && norm_view.sizes[0] == feature.batch,
                    "norm must hold one number a sample");
    args.norm.data = norm_view.data;
    args.norm.stride_n = norm_view.strides[0];
  }
  args.dx = feature_of(view_of(out, "gradient"), "gradient");
  args.streaming = streams_past_caches(bytes_of(args.dx));
  return args;
}

}  // namespace fastkd
