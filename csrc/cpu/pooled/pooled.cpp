// Channel power maps with means over space on a CPU: checks, allocation and the division among threads. The
// passes are in pooled.inl, the schemas in fastkd/ops/pooled.py.
#include "cpu/pooled/pooled.h"

#include <optional>
#include <tuple>

#include "cpu/dispatch.h"
#include "cpu/host.h"

namespace fastkd {
namespace {

struct Input {
  TensorView view;
  Feature shape;
  PooledArgs args;
};

Input input_of(const Tensor& x) {
  Input in = {view_of(x, "x"), {}, {}};
  in.shape = feature_of(in.view, "x");
  STD_TORCH_CHECK(in.view.dtype != DType::kDouble, "x must be float16, bfloat16 or float32");
  in.args = {in.view.dtype,     lies_by_planes(in.shape),
             in.shape.channels, in.shape.positions,
             in.view.data,      nullptr,
             nullptr,           nullptr,
             nullptr,           nullptr};
  STD_TORCH_CHECK(in.args.planes || lies_by_positions(in.shape), "x must be dense, planes or channels last");
  return in;
}

std::tuple<Tensor, Tensor> pooled_map(const Tensor& x) {
  Input in = input_of(x);
  int64_t sizes[kMaxDims];
  map_sizes(in.view, sizes);
  Tensor map = empty(sizes, in.view.dim - 1, DType::kFloat);
  const int64_t shape[2] = {in.shape.batch, in.shape.channels};
  Tensor mean = empty(shape, 2, DType::kFloat);
  in.args.map = static_cast<float*>(map.mutable_data_ptr());
  in.args.mean = static_cast<float*>(mean.mutable_data_ptr());
  const auto run = kernels().pooled.forward;
  parallel_units(in.shape.batch, in.shape.channels * in.shape.positions, 0,
                 [&](int64_t begin, int64_t end, void*) { run(in.args, begin, end); });
  return {std::move(map), std::move(mean)};
}

const float* grad_of(const std::optional<Tensor>& grad, int64_t rows, int64_t columns, const char* name) {
  if (!grad) return nullptr;
  const TensorView view = view_of(*grad, name);
  int64_t count = 1;
  for (int32_t d = view.dim - 1; d >= 0; count *= view.sizes[d--])
    STD_TORCH_CHECK(view.sizes[d] == 1 || view.strides[d] == count, name, " must be contiguous");
  STD_TORCH_CHECK(
      view.dtype == DType::kFloat && view.dim > 0 && count == rows * columns && view.sizes[0] == rows, name,
      " must be float32 and of the shape of what it is the gradient of");
  return static_cast<const float*>(view.data);
}

Tensor pooled_map_backward(std::optional<Tensor> map_grad, std::optional<Tensor> mean_grad, const Tensor& x) {
  Input in = input_of(x);
  in.args.map_grad = grad_of(map_grad, in.shape.batch, in.shape.positions, "map_grad");
  in.args.mean_grad = grad_of(mean_grad, in.shape.batch, in.shape.channels, "mean_grad");
  Tensor result = empty_like(x, in.view);
  in.args.grad = result.mutable_data_ptr();
  const auto run = kernels().pooled.backward;
  parallel_units(in.shape.batch, in.shape.channels * in.shape.positions, 0,
                 [&](int64_t begin, int64_t end, void*) { run(in.args, begin, end); });
  return result;
}

}  // namespace
}  // namespace fastkd

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("pooled_map", FASTKD_BOX(fastkd::pooled_map));
  m.impl("pooled_map_backward", FASTKD_BOX(fastkd::pooled_map_backward));
}
