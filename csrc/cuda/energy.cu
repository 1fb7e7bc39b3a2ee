// fastkd::channel_energy(Tensor x) -> Tensor: q[n, s] = mean over c of x[n, c, s]^2, the un-normalized attention map for p = 2.
// x: contiguous (N, C, *S), fp16, bf16 or fp32, on a GPU. Result: (N, *S), fp32.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 16;  // the loop below takes the rest, so that any size fits one launch

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// One thread per position: neighbours in a warp read neighbours in memory, and each position's sum has a fixed order.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    channel_energy_kernel(const T* __restrict__ x, float* __restrict__ q, int64_t samples, int64_t channels, int64_t positions) {
  const int64_t total = samples * positions;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total; i += step) {
    const int64_t n = i / positions;
    const T* p = x + n * channels * positions + (i - n * positions);
    float sum = 0.0f;
    for (int64_t c = 0; c < channels; ++c, p += positions) {
      const float v = to_float(*p);
      sum = fmaf(v, v, sum);
    }
    q[i] = sum / static_cast<float>(channels);
  }
}

template <typename T>
void launch(const Tensor& x, Tensor& q, int64_t samples, int64_t channels, int64_t positions, cudaStream_t stream) {
  const int64_t blocks = std::min(kMaxBlocks, (samples * positions + kThreads - 1) / kThreads);
  channel_energy_kernel<T><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
      static_cast<const T*>(x.const_data_ptr()), static_cast<float*>(q.mutable_data_ptr()), samples, channels, positions);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor channel_energy(const Tensor& x) {
  STD_TORCH_CHECK(x.is_cuda(), "channel_energy: x must be on a CUDA device");
  STD_TORCH_CHECK(x.dim() >= 3 && x.dim() <= 5, "channel_energy: x must be (N, C, *S) with one to three spatial dimensions, got ", x.dim(),
                  " dimensions");
  STD_TORCH_CHECK(x.is_contiguous(), "channel_energy: x must be contiguous");
  STD_TORCH_CHECK(x.numel() > 0, "channel_energy: x is empty");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  std::vector<int64_t> shape{x.size(0)};
  int64_t positions = 1;
  for (int64_t d = 2; d < x.dim(); ++d) {
    shape.push_back(x.size(d));
    positions *= x.size(d);
  }
  Tensor q = torch::stable::new_empty(x, shape, ScalarType::Float);
  const auto s = static_cast<cudaStream_t>(stream);
  switch (x.scalar_type()) {
    case ScalarType::Float:
      launch<float>(x, q, x.size(0), x.size(1), positions, s);
      break;
    case ScalarType::Half:
      launch<__half>(x, q, x.size(0), x.size(1), positions, s);
      break;
    case ScalarType::BFloat16:
      launch<__nv_bfloat16>(x, q, x.size(0), x.size(1), positions, s);
      break;
    default:
      STD_TORCH_CHECK(false, "channel_energy: x must be float16, bfloat16 or float32");
  }
  return q;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CUDA, m) { m.impl("channel_energy", TORCH_BOX(&channel_energy)); }
