// The tap operators for the CPU: checks, allocation and the parallel region. The passes are in tap.inl, the
// schemas in fastkd/ops/feature_map.py.
#include "cpu/attention/tap.h"

#include <optional>
#include <tuple>

#include "cpu/attention/sides.h"
#include "cpu/dispatch.h"

namespace fastkd {
namespace {

std::tuple<Tensor, Tensor, Tensor> relu_tap(const Tensor& x, const std::optional<Tensor>& residual, double p,
                                            const Text& channel_reduce, bool is_signed, double eps,
                                            const Text& eps_mode) {
  const TensorView view = view_of(x, "x");
  ReluTapArgs args;
  args.x = feature_of(view, "x");
  args.residual = args.x;
  args.residual.data = nullptr;
  if (residual) {
    const TensorView residual_view = view_of(*residual, "residual");
    check_like(residual_view, view, "residual");
    args.residual = feature_of(residual_view, "residual");
  }
  args.options = options_of(p, channel_reduce, is_signed, eps, eps_mode);
  args.accumulation = accumulation(view.dtype, view.dtype);
  Tensor y = empty_like(x, view);
  const Feature feature = feature_of(view_of(y, "y"), "y");
  args.y = side_of(feature, make_pool(feature.size, feature.size, false).plan);

  int64_t sizes[kMaxDims];
  map_sizes(view, sizes);
  Tensor map = empty(sizes, view.dim - 1, args.accumulation);
  Tensor norm = empty(&feature.batch, 1, args.accumulation);
  args.map = map.mutable_data_ptr();
  args.norm = norm.mutable_data_ptr();
  const bool in_place = feature.layout == args.x.layout && feature.layout == args.residual.layout &&
                        feature.layout != Layout::kGeneric;
  const auto run = kernels().tap.relu;
  parallel_units(feature.batch, feature.channels * feature.positions,
                 scratch_of(args.y, 1, in_place, args.accumulation),
                 [&](int64_t begin, int64_t end, void* scratch) { run(args, begin, end, scratch); });
  return {std::move(y), std::move(map), std::move(norm)};
}

// A gradient of zeros that is read like x: one run of zeros, at which every plane (or position) begins.
Feature zeros_like(const Feature& x, std::vector<double>& zeros) {
  zeros.assign(static_cast<size_t>(x.layout == Layout::kChannelsLast ? x.channels : x.positions), 0);
  Feature g = x;
  g.data = zeros.data();
  g.stride_n = 0;
  if (x.layout == Layout::kChannelsLast) {
    g.stride_s = g.stride[0] = g.stride[1] = g.stride[2] = 0;
    return g;
  }
  g.layout = Layout::kPlanes;
  g.stride_c = 0;
  g.stride_s = 1;
  return g;
}

Tensor backward(const std::optional<Tensor>& grad, const Tensor& map_grad, const Tensor& x, const Tensor& map,
                const Tensor& norm, const AttentionOptions& options, bool relu) {
  const TensorView view = view_of(x, "x");
  Tensor out = empty_like(x, view);
  TapBackwardArgs args;
  args.map = map_backward_args(map_grad, view, map, norm, options, true, out);
  args.relu = relu;
  const Feature& feature = args.map.side.x;
  std::vector<double> zeros;
  if (grad) {
    const TensorView grad_view = view_of(*grad, "grad");
    check_like(grad_view, view, "grad");
    args.grad = feature_of(grad_view, "grad");
  } else {
    args.grad = zeros_like(feature, zeros);
  }
  const bool in_place = feature.layout == args.map.dx.layout && feature.layout == args.grad.layout &&
                        feature.layout != Layout::kGeneric;
  const auto run = kernels().tap.backward;
  parallel_units(feature.batch, feature.channels * feature.positions,
                 scratch_of(args.map.side, 2, in_place, args.map.accumulation),
                 [&](int64_t begin, int64_t end, void* scratch) { run(args, begin, end, scratch); });
  return out;
}

Tensor tap_backward(const std::optional<Tensor>& grad, const Tensor& map_grad, const Tensor& x,
                    const Tensor& map, const Tensor& norm, double p, const Text& channel_reduce,
                    bool is_signed, double eps, const Text& eps_mode) {
  const AttentionOptions options = options_of(p, channel_reduce, is_signed, eps, eps_mode);
  return backward(grad, map_grad, x, map, norm, options, false);
}

Tensor relu_tap_backward(const std::optional<Tensor>& grad, const Tensor& map_grad, const Tensor& y,
                         const Tensor& map, const Tensor& norm, double p, const Text& channel_reduce,
                         bool is_signed, double eps, const Text& eps_mode) {
  const AttentionOptions options = options_of(p, channel_reduce, is_signed, eps, eps_mode);
  return backward(grad, map_grad, y, map, norm, options, true);
}

}  // namespace
}  // namespace fastkd

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("tap_backward", FASTKD_BOX(fastkd::tap_backward));
  m.impl("relu_tap", FASTKD_BOX(fastkd::relu_tap));
  m.impl("relu_tap_backward", FASTKD_BOX(fastkd::relu_tap_backward));
}
