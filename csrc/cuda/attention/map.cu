// The attention map and the taps for CUDA: checks, allocation and launches. The kernels are in
// map.cuh, the schemas in fastkd/ops/_attention_operators.py and fastkd/ops/feature_map.py.
#include "cuda/attention/map.cuh"

#include <optional>
#include <tuple>

#include "common/attention_arguments.h"

namespace fastkd {
namespace {

// A map and its norms, of x, or of y = relu(x + residual), which is written on the way, where `y` is given.
std::tuple<Tensor, Tensor> make_map(const char* name, const OnDevice& device, const TensorView& view,
                                    const Feature& x, const Feature* residual, const Feature* y,
                                    const AttentionOptions& options, bool normalize) {
  check_served(options);
  const DType accumulated = accumulation(view.dtype, view.dtype);
  const Feature* tensors[3] = {&x};
  int count = 1;
  if (residual != nullptr) tensors[count++] = residual;
  if (y != nullptr) tensors[count++] = y;
  MapArgs args;
  args.view = matrix_view_of(tensors, count, unit_goal(bytes_of(x)));
  args.x = place_of(x, args.view);
  if (y != nullptr) {
    args.relu.residual = place_of(residual != nullptr ? *residual : x, args.view);
    if (residual == nullptr) args.relu.residual.data = nullptr;
    args.relu.y = place_of(*y, args.view);
  }
  args.eps = options.eps;
  args.normalize = normalize;
  args.mean = options.mean;
  args.add_eps = options.add_eps;

  int64_t sizes[kMaxDims];
  map_sizes(view, sizes);
  Tensor map = device.empty(sizes, view.dim - 1, accumulated);
  const int64_t norms = normalize ? x.batch : 0;
  Tensor norm = device.empty(&norms, 1, accumulated);
  const int64_t sums = x.batch * args.view.parts * x.positions;
  Tensor scratch = device.empty(&sums, 1, accumulated);
  const Tickets tickets = device.tickets(x.batch);
  args.sums = scratch.mutable_data_ptr();
  args.map = map.mutable_data_ptr();
  args.norm = norm.mutable_data_ptr();
  args.tickets = tickets.first;
  const bool in_double = accumulated == DType::kDouble;
  const auto kernel = y != nullptr ? (in_double ? map_kernel<true, double> : map_kernel<true, float>)
                                   : (in_double ? map_kernel<false, double> : map_kernel<false, float>);
  launch(name, kernel, x.batch * args.view.units, kThreads,
         in_double ? kSharedBytes<double> : kSharedBytes<float>, device, args);
  return {std::move(map), std::move(norm)};
}

MapPlace place_of_map(const Tensor& map, const TensorView& first, const Feature& x, const char* name,
                      const char* both) {
  const TensorView view = view_of(map, name);
  check_device(view, first, name);
  check_accumulation(view, accumulation(x.dtype, x.dtype), name);
  const Feature feature = map_of(view, name);
  check_same(feature, x, both);
  return {feature.data,
          feature.stride_n,
          {feature.stride[0], feature.stride[1], feature.stride[2]},
          feature.layout == Layout::kPlanes};
}

// x's gradient: that of its map, and of what is tapped.
Tensor gradient(const char* name, const std::optional<Tensor>& grad, const Tensor& map_grad, const Tensor& x,
                const Tensor& map, const Tensor& norm, const AttentionOptions& options, bool normalize,
                bool tapped, bool relu) {
  check_served(options);
  const TensorView view = view_of(x, "x");
  const Feature feature = feature_of(view, "x");
  MapGradientArgs args;
  args.grad = place_of_map(map_grad, view, feature, "map's gradient", "map's gradient and x");
  args.map = args.grad;
  if (normalize) {
    args.map = place_of_map(map, view, feature, "map", "map and x");
    const TensorView norm_view = view_of(norm, "norm");
    check_device(norm_view, view, "norm");
    check_accumulation(norm_view, accumulation(view.dtype, view.dtype), "norm");
    STD_TORCH_CHECK(norm_view.dim == 1 && norm_view.sizes[0] == feature.batch,
                    "norm must hold one number a sample");
    args.norm = norm_view.data;
    args.norm_stride = norm_view.strides[0];
  }
  const OnDevice device(view);
  Tensor out = empty_like(x, view);
  const Feature dx = feature_of(view_of(out, "gradient"), "gradient");
  Feature other{};
  const Feature* tensors[3] = {&feature, &dx, &other};
  if (grad) {
    const TensorView grad_view = view_of(*grad, "grad");
    check_device(grad_view, view, "grad");
    check_like(grad_view, view, "grad");
    other = feature_of(grad_view, "grad");
  }
  args.view = matrix_view_of(tensors, grad ? 3 : 2, unit_goal(bytes_of(feature)));
  args.x = place_of(feature, args.view);
  args.dx = place_of(dx, args.view);
  args.tap.grad = place_of(other, args.view);  // null, if there is none
  args.tap.relu = relu;
  args.eps = options.eps;
  args.normalize = normalize;
  args.mean = options.mean;
  args.add_eps = options.add_eps;
  const bool in_double = view.dtype == DType::kDouble;
  const auto kernel =
      tapped ? (in_double ? map_gradient_kernel<true, double> : map_gradient_kernel<true, float>)
             : (in_double ? map_gradient_kernel<false, double> : map_gradient_kernel<false, float>);
  launch(name, kernel, feature.batch * args.view.units, kThreads,
         in_double ? kSharedBytes<double> : kSharedBytes<float>, device, args);
  return out;
}

std::tuple<Tensor, Tensor> attention_map(const Tensor& x, double p, const Text& channel_reduce,
                                         bool is_signed, bool normalize, double eps, const Text& eps_mode) {
  const TensorView view = view_of(x, "x");
  const Feature feature = feature_of(view, "x");
  const OnDevice device(view);
  return make_map("attention_map", device, view, feature, nullptr, nullptr,
                  options_of(p, channel_reduce, is_signed, eps, eps_mode), normalize);
}

Tensor attention_map_backward(const Tensor& grad, const Tensor& x, const Tensor& map, const Tensor& norm,
                              double p, const Text& channel_reduce, bool is_signed, bool normalize,
                              double eps, const Text& eps_mode) {
  return gradient("attention_map_backward", std::nullopt, grad, x, map, norm,
                  options_of(p, channel_reduce, is_signed, eps, eps_mode), normalize, false, false);
}

std::tuple<Tensor, Tensor, Tensor> relu_tap(const Tensor& x, const std::optional<Tensor>& residual, double p,
                                            const Text& channel_reduce, bool is_signed, double eps,
                                            const Text& eps_mode) {
  const TensorView view = view_of(x, "x");
  const Feature feature = feature_of(view, "x");
  Feature other{};
  if (residual) {
    const TensorView residual_view = view_of(*residual, "residual");
    check_device(residual_view, view, "residual");
    check_like(residual_view, view, "residual");
    other = feature_of(residual_view, "residual");
  }
  const OnDevice device(view);
  Tensor out = empty_like(x, view);
  const Feature y = feature_of(view_of(out, "y"), "y");
  auto [map, norm] = make_map("relu_tap", device, view, feature, residual ? &other : nullptr, &y,
                              options_of(p, channel_reduce, is_signed, eps, eps_mode), true);
  return {std::move(out), std::move(map), std::move(norm)};
}

Tensor tap_backward(const std::optional<Tensor>& grad, const Tensor& map_grad, const Tensor& x,
                    const Tensor& map, const Tensor& norm, double p, const Text& channel_reduce,
                    bool is_signed, double eps, const Text& eps_mode) {
  return gradient("tap_backward", grad, map_grad, x, map, norm,
                  options_of(p, channel_reduce, is_signed, eps, eps_mode), true, true, false);
}

Tensor relu_tap_backward(const std::optional<Tensor>& grad, const Tensor& map_grad, const Tensor& y,
                         const Tensor& map, const Tensor& norm, double p, const Text& channel_reduce,
                         bool is_signed, double eps, const Text& eps_mode) {
  return gradient("relu_tap_backward", grad, map_grad, y, map, norm,
                  options_of(p, channel_reduce, is_signed, eps, eps_mode), true, true, true);
}

}  // namespace
}  // namespace fastkd

STABLE_TORCH_LIBRARY_IMPL(fastkd_cuda, FASTKD_DISPATCH_KEY, m) {
  m.impl("attention_map", FASTKD_BOX(fastkd::attention_map));
  m.impl("attention_map_backward", FASTKD_BOX(fastkd::attention_map_backward));
  m.impl("tap_backward", FASTKD_BOX(fastkd::tap_backward));
  m.impl("relu_tap", FASTKD_BOX(fastkd::relu_tap));
  m.impl("relu_tap_backward", FASTKD_BOX(fastkd::relu_tap_backward));
}
