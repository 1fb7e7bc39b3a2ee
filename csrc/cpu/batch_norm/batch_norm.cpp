// Batch norm in training, with the addition and the ReLU that follow it, for the CPU: checks, allocation, the
// parallel regions and what joins them. The passes are in batch_norm.inl, the schemas in
// fastkd/ops/batch_norm.py.
#include "cpu/batch_norm/batch_norm.h"

#include <cmath>
#include <optional>
#include <tuple>

#include "cpu/dispatch.h"
#include "cpu/host.h"

namespace fastkd {
namespace {

// Numbers of a chunk: 32 KiB in float32, read twice, the second time from the first-level cache.
constexpr int64_t kChunkElements = 8192;
// Channels of a row, at least, where rows can be folded: sums in several vectors.
constexpr int64_t kWidth = 64;

NormRows rows_of(const Feature& x, const char* name) {
  STD_TORCH_CHECK(lies_by_positions(x), name, " must be dense and channels_last");
  STD_TORCH_CHECK(x.dtype != DType::kDouble, name, " must be float16, bfloat16 or float32");
  NormRows size = {x.dtype, x.batch * x.positions, x.channels, 1, 1};
  for (; size.channels < kWidth && size.rows % 2 == 0; size.rows /= 2) size.channels *= 2, size.fold *= 2;
  if (size.channels < kChunkElements) size.chunk = kChunkElements / size.channels;
  return size;
}

int64_t chunks_of(const NormRows& size) { return (size.rows + size.chunk - 1) / size.chunk; }

// A tensor that lies in memory as x does.
const void* alike(const Tensor& tensor, const TensorView& x, const char* name) {
  const TensorView view = view_of(tensor, name);
  check_like(view, x, name);
  rows_of(feature_of(view, name), name);
  return view.data;
}

// A number a channel, for each position of a row.
std::vector<float> repeated(const float* vector, const NormRows& size) {
  const int64_t C = size.channels / size.fold;
  std::vector<float> result(static_cast<size_t>(size.channels));
  for (int64_t i = 0; i < size.channels; ++i) result[i] = vector[i % C];
  return result;
}

template <class F>
void over_chunks(const NormRows& size, const F& f) {
  parallel_units(chunks_of(size), size.chunk * size.channels, 0,
                 [&](int64_t begin, int64_t end, void*) { f(begin, end); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm(const Tensor& x, const std::optional<Tensor>& residual,
                                                      const Tensor& weight, const Tensor& bias, bool relu,
                                                      double eps) {
  const TensorView view = view_of(x, "x");
  NormArgs args;
  args.size = rows_of(feature_of(view, "x"), "x");
  const int64_t width = args.size.channels, C = width / args.size.fold, chunks = chunks_of(args.size);
  const double count = static_cast<double>(args.size.rows * args.size.fold);
  STD_TORCH_CHECK(count > 1, "x must have more than one value a channel");
  args.x = view.data;
  args.residual = residual ? alike(*residual, view, "residual") : nullptr;
  const float *factor = vector_of(weight, C, "weight"), *offset = vector_of(bias, C, "bias");
  args.relu = relu;
  Tensor y = empty_like(x, view);
  args.y = y.mutable_data_ptr();
  Tensor mean = empty(&C, 1, DType::kFloat), variance = empty(&C, 1, DType::kFloat),
         invstd = empty(&C, 1, DType::kFloat);
  float *means = static_cast<float*>(mean.mutable_data_ptr()),
        *variances = static_cast<float*>(variance.mutable_data_ptr());
  float* inverses = static_cast<float*>(invstd.mutable_data_ptr());
  std::vector<float> parts(static_cast<size_t>(chunks * 2 * width)), slope(static_cast<size_t>(C));
  args.parts = parts.data();
  const NormKernels& run = kernels().norm;
  over_chunks(args.size, [&](int64_t begin, int64_t end) { run.moments(args, begin, end); });

  std::vector<double> sum(static_cast<size_t>(C)), squares(static_cast<size_t>(C));
  const auto rows_in = [&](int64_t chunk) {
    return static_cast<double>(chunk + 1 < chunks ? args.size.chunk
                                                  : args.size.rows - chunk * args.size.chunk);
  };
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t i = 0; i < width; ++i) sum[i % C] += rows_in(chunk) * parts[chunk * 2 * width + i];
  for (int64_t c = 0; c < C; ++c) sum[c] /= count;
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t i = 0; i < width; ++i) {
      const double distance = parts[chunk * 2 * width + i] - sum[i % C];
      squares[i % C] += parts[(chunk * 2 + 1) * width + i] + rows_in(chunk) * distance * distance;
    }
  for (int64_t c = 0; c < C; ++c) {
    const double inverse = 1 / std::sqrt(squares[c] / count + eps);
    means[c] = static_cast<float>(sum[c]);
    variances[c] = static_cast<float>(squares[c] / (count - 1));
    inverses[c] = static_cast<float>(inverse);
    slope[c] = static_cast<float>(inverse * factor[c]);
  }
  const std::vector<float> all_means = repeated(means, args.size), slopes = repeated(slope.data(), args.size),
                           offsets = repeated(offset, args.size);
  args.mean = all_means.data();
  args.slope = slopes.data();
  args.bias = offsets.data();
  over_chunks(args.size, [&](int64_t begin, int64_t end) { run.apply(args, begin, end); });
  return {std::move(y), std::move(mean), std::move(variance), std::move(invstd)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward(const Tensor& grad, const Tensor& x,
                                                               const std::optional<Tensor>& y,
                                                               const Tensor& weight, const Tensor& bias,
                                                               const Tensor& mean, const Tensor& invstd,
                                                               bool relu, bool residual) {
  const TensorView view = view_of(x, "x");
  NormBackwardArgs args;
  args.size = rows_of(feature_of(view, "x"), "x");
  const int64_t width = args.size.channels, C = width / args.size.fold, chunks = chunks_of(args.size);
  args.x = view.data;
  args.grad = alike(grad, view, "grad");
  args.y = y ? alike(*y, view, "y") : nullptr;
  STD_TORCH_CHECK(!(relu && residual) || args.y, "y is needed where a residual was added before the ReLU");
  args.relu = relu;
  const float *factor = vector_of(weight, C, "weight"), *inverse = vector_of(invstd, C, "invstd");
  const std::vector<float> means = repeated(vector_of(mean, C, "mean"), args.size),
                           offsets = repeated(vector_of(bias, C, "bias"), args.size);
  Tensor dx = empty_like(x, view), dweight = empty(&C, 1, DType::kFloat), dbias = empty(&C, 1, DType::kFloat);
  const int64_t none = 0;
  Tensor passed = relu && residual ? empty_like(x, view) : empty(&none, 1, view.dtype);
  args.passed = relu && residual ? passed.mutable_data_ptr() : nullptr;
  args.dx = dx.mutable_data_ptr();
  std::vector<float> parts(static_cast<size_t>(chunks * 2 * width)), slope(static_cast<size_t>(C)),
      along(slope), constant(slope);
  for (int64_t c = 0; c < C; ++c) slope[c] = static_cast<float>(static_cast<double>(inverse[c]) * factor[c]);
  const std::vector<float> slopes = repeated(slope.data(), args.size);
  args.parts = parts.data();
  args.mean = means.data();
  args.slope = slopes.data();
  args.bias = offsets.data();
  const NormKernels& run = kernels().norm;
  over_chunks(args.size, [&](int64_t begin, int64_t end) { run.sums(args, begin, end); });

  std::vector<double> totals(static_cast<size_t>(C)), dots(totals);
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t i = 0; i < width; ++i) {
      totals[i % C] += parts[chunk * 2 * width + i];
      dots[i % C] += parts[(chunk * 2 + 1) * width + i];
    }
  float *weights = static_cast<float*>(dweight.mutable_data_ptr()),
        *biases = static_cast<float*>(dbias.mutable_data_ptr());
  const double count = static_cast<double>(args.size.rows * args.size.fold);
  for (int64_t c = 0; c < C; ++c) {
    weights[c] = static_cast<float>(dots[c] * inverse[c]);
    biases[c] = static_cast<float>(totals[c]);
    along[c] = static_cast<float>(slope[c] * dots[c] / count * inverse[c] * inverse[c]);
    constant[c] = static_cast<float>(slope[c] * totals[c] / count);
  }
  const std::vector<float> alongs = repeated(along.data(), args.size),
                           constants = repeated(constant.data(), args.size);
  args.along = alongs.data();
  args.constant = constants.data();
  over_chunks(args.size, [&](int64_t begin, int64_t end) { run.gradient(args, begin, end); });
  return {std::move(dx), std::move(dweight), std::move(dbias), std::move(passed)};
}

Tensor add_relu_(Tensor x, const std::optional<Tensor>& residual) {
  const TensorView view = view_of(x, "x");
  const NormRows size = rows_of(feature_of(view, "x"), "x");
  const JoinArgs args = {view.dtype, view.data, residual ? alike(*residual, view, "residual") : nullptr};
  const auto run = kernels().norm.join;
  parallel_units(size.rows * size.channels, 1, 0,
                 [&](int64_t begin, int64_t end, void*) { run(args, begin, end); });
  return x;
}

}  // namespace
}  // namespace fastkd

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("batch_norm", FASTKD_BOX(fastkd::batch_norm));
  m.impl("batch_norm_backward", FASTKD_BOX(fastkd::batch_norm_backward));
  m.impl("add_relu_", FASTKD_BOX(fastkd::add_relu_));
}
