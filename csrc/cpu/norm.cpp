// Batch norm in training, with the addition and the ReLU that follow it, for the CPU: checks, allocation, the parallel regions and what
// joins them. The passes are in norm.inl, the schemas in fastkd/ops/norm.py.
#include "norm.h"

#include <cmath>
#include <optional>
#include <tuple>

#include "dispatch.h"

namespace fastkd {
namespace {

constexpr int64_t kChunkElements = 8192;  // 32 KB in float32: read twice, from the first cache the second time

NormRows rows_of(const Feature& x, const char* name) {
  const bool dense = (x.channels == 1 || x.stride_c == 1) &&
                     (x.positions == 1 || (x.layout != Layout::kGeneric && x.stride_s == x.channels)) &&
                     (x.batch == 1 || x.stride_n == x.channels * x.positions);
  STD_TORCH_CHECK(dense, name, " must be dense and channels_last");
  STD_TORCH_CHECK(x.dtype != DType::kDouble, name, " must be float16, bfloat16 or float32");
  const int64_t chunk = kChunkElements / x.channels;
  return {x.dtype, x.batch * x.positions, x.channels, chunk > 0 ? chunk : 1};
}

int64_t chunks_of(const NormRows& size) { return (size.rows + size.chunk - 1) / size.chunk; }

const float* vector_of(const Tensor& tensor, int64_t channels, const char* name) {
  const TensorView view = view_of(tensor, name);
  STD_TORCH_CHECK(view.dtype == DType::kFloat && view.dim == 1 && view.sizes[0] == channels && (channels == 1 || view.strides[0] == 1),
                  name, " must be float32, dense, one number a channel");
  return static_cast<const float*>(view.data);
}

// A tensor that lies in memory as x does.
const void* alike(const Tensor& tensor, const TensorView& x, const char* name) {
  const TensorView view = view_of(tensor, name);
  check_like(view, x, name);
  rows_of(feature_of(view, name), name);
  return view.data;
}

template <class F>
void over_chunks(const NormRows& size, const F& f) {
  parallel_units(chunks_of(size), size.chunk * size.channels, 0, [&](int64_t begin, int64_t end, void*) { f(begin, end); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight,
                                                      const Tensor& bias, bool relu, double eps) {
  const TensorView view = view_of(x, "x");
  NormArgs args;
  args.size = rows_of(feature_of(view, "x"), "x");
  const int64_t C = args.size.channels, rows = args.size.rows, chunks = chunks_of(args.size);
  STD_TORCH_CHECK(rows > 1, "x must have more than one value a channel");
  args.x = view.data;
  args.residual = residual ? alike(*residual, view, "residual") : nullptr;
  args.bias = vector_of(bias, C, "bias");
  const float* factor = vector_of(weight, C, "weight");
  args.relu = relu;
  Tensor y = empty_like(x, view);
  args.y = y.mutable_data_ptr();
  Tensor mean = empty(&C, 1, DType::kFloat), variance = empty(&C, 1, DType::kFloat), invstd = empty(&C, 1, DType::kFloat);
  float *means = static_cast<float*>(mean.mutable_data_ptr()), *variances = static_cast<float*>(variance.mutable_data_ptr());
  float* inverses = static_cast<float*>(invstd.mutable_data_ptr());
  std::vector<float> parts(static_cast<size_t>(chunks * 2 * C)), slope(static_cast<size_t>(C));
  args.parts = parts.data();
  args.mean = means;
  args.slope = slope.data();
  const NormKernels& run = kernels().norm;
  over_chunks(args.size, [&](int64_t begin, int64_t end) { run.moments(args, begin, end); });

  std::vector<double> sum(static_cast<size_t>(C)), squares(static_cast<size_t>(C));
  const auto count_of = [&](int64_t chunk) {
    return static_cast<double>(chunk + 1 < chunks ? args.size.chunk : rows - chunk * args.size.chunk);
  };
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t c = 0; c < C; ++c) sum[c] += count_of(chunk) * parts[chunk * 2 * C + c];
  for (int64_t c = 0; c < C; ++c) sum[c] /= static_cast<double>(rows);
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t c = 0; c < C; ++c) {
      const double distance = parts[chunk * 2 * C + c] - sum[c];
      squares[c] += parts[(chunk * 2 + 1) * C + c] + count_of(chunk) * distance * distance;
    }
  for (int64_t c = 0; c < C; ++c) {
    const double inverse = 1 / std::sqrt(squares[c] / static_cast<double>(rows) + eps);
    means[c] = static_cast<float>(sum[c]);
    variances[c] = static_cast<float>(squares[c] / static_cast<double>(rows - 1));
    inverses[c] = static_cast<float>(inverse);
    slope[c] = static_cast<float>(inverse * factor[c]);
  }
  over_chunks(args.size, [&](int64_t begin, int64_t end) { run.apply(args, begin, end); });
  return {std::move(y), std::move(mean), std::move(variance), std::move(invstd)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& y,
                                                               const Tensor& weight, const Tensor& bias, const Tensor& mean,
                                                               const Tensor& invstd, bool relu, bool residual) {
  const TensorView view = view_of(x, "x");
  NormBackwardArgs args;
  args.size = rows_of(feature_of(view, "x"), "x");
  const int64_t C = args.size.channels, chunks = chunks_of(args.size);
  args.x = view.data;
  args.grad = alike(grad, view, "grad");
  args.y = y ? alike(*y, view, "y") : nullptr;
  STD_TORCH_CHECK(!(relu && residual) || args.y, "y is needed where a residual was added before the ReLU");
  args.relu = relu;
  args.mean = vector_of(mean, C, "mean");
  args.bias = vector_of(bias, C, "bias");
  const float *factor = vector_of(weight, C, "weight"), *inverse = vector_of(invstd, C, "invstd");
  Tensor dx = empty_like(x, view), dweight = empty(&C, 1, DType::kFloat), dbias = empty(&C, 1, DType::kFloat);
  const int64_t none = 0;
  Tensor passed = relu && residual ? empty_like(x, view) : empty(&none, 1, view.dtype);
  args.passed = relu && residual ? passed.mutable_data_ptr() : nullptr;
  args.dx = dx.mutable_data_ptr();
  std::vector<float> parts(static_cast<size_t>(chunks * 2 * C)), vectors(static_cast<size_t>(3 * C));
  float *slope = vectors.data(), *along = slope + C, *constant = along + C;
  for (int64_t c = 0; c < C; ++c) slope[c] = static_cast<float>(static_cast<double>(inverse[c]) * factor[c]);
  args.parts = parts.data();
  args.slope = slope;
  args.along = along;
  args.constant = constant;
  const NormKernels& run = kernels().norm;
  over_chunks(args.size, [&](int64_t begin, int64_t end) { run.sums(args, begin, end); });

  std::vector<double> sums(static_cast<size_t>(2 * C));
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t i = 0; i < 2 * C; ++i) sums[i] += parts[chunk * 2 * C + i];
  float *weights = static_cast<float*>(dweight.mutable_data_ptr()), *biases = static_cast<float*>(dbias.mutable_data_ptr());
  const double rows = static_cast<double>(args.size.rows);
  for (int64_t c = 0; c < C; ++c) {
    const double total = sums[c], dot = sums[C + c];
    weights[c] = static_cast<float>(dot * inverse[c]);
    biases[c] = static_cast<float>(total);
    along[c] = static_cast<float>(slope[c] * dot / rows * inverse[c] * inverse[c]);
    constant[c] = static_cast<float>(slope[c] * total / rows);
  }
  over_chunks(args.size, [&](int64_t begin, int64_t end) { run.gradient(args, begin, end); });
  return {std::move(dx), std::move(dweight), std::move(dbias), std::move(passed)};
}

}  // namespace
}  // namespace fastkd

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("batch_norm", TORCH_BOX(&fastkd::batch_norm));
  m.impl("batch_norm_backward", TORCH_BOX(&fastkd::batch_norm_backward));
}
