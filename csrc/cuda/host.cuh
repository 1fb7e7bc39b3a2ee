// The host side of the CUDA operators: the device of a call, its stream, its tickets, and the launch of a
// kernel.
#pragma once

#include <optional>

#include "cuda/device.cuh"

#ifndef FASTKD_EMULATE
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace fastkd {

#ifdef FASTKD_EMULATE
#define FASTKD_DISPATCH_KEY CPU
using Stream = void*;
#else
#define FASTKD_DISPATCH_KEY CUDA
using Stream = cudaStream_t;
#endif

// Counters for is_last(), all 0: the first of them, and the memory of their own, if they have any. It must
// live until the kernel is launched.
struct Tickets {
  unsigned* first;
  std::optional<Tensor> memory;
};

// Makes the device of `view` the current one while it lives. All work of a call goes to that device's current
// stream.
class OnDevice {
 public:
  explicit OnDevice(const TensorView& view);
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  Stream stream() const { return stream_; }
  Tensor empty(const int64_t* sizes, int64_t dim, DType dtype) const {
    return fastkd::empty(sizes, dim, dtype, index_);
  }
  // They belong to the stream, whose next call finds them 0 again. A CUDA graph may be replayed on any
  // stream, beside others: each captured call has counters of its own. Where there are none left, memory of
  // its own is cleared by each call, or at each replay.
  Tickets tickets(int64_t count) const;

 private:
  int32_t index_;
  Stream stream_;
#ifndef FASTKD_EMULATE
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

// Refuses a sample with more channels or positions than kernels can count: they do so in int32, and go some
// way past the end.
void check_count(int64_t count);

// A size that a launch can have: blocks in [1, 2^31), else an error that names the kernel.
unsigned grid_of(const char* name, int64_t blocks);
#ifndef FASTKD_EMULATE
void check_launch(const char* name, cudaError_t status);
#endif
// Lets a kernel have more shared memory than the 48 KiB that all have.
void allow_shared(const char* name, const void* kernel, size_t bytes);

// Runs `kernel`, whose arguments go by value, on the device's stream; an error of the launch raises and names
// it.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, unsigned threads,
            size_t shared_bytes, const OnDevice& device, const Arguments&... arguments) {
  const unsigned grid = grid_of(name, blocks);
#ifdef FASTKD_EMULATE
  (void)device;
  emulate::run(name, grid, threads, shared_bytes, [&] { kernel(arguments...); });
#else
  if (shared_bytes > 48 << 10) allow_shared(name, reinterpret_cast<const void*>(kernel), shared_bytes);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = device.stream();
  check_launch(name, cudaLaunchKernelEx(&config, kernel, arguments...));
#endif
}

// All tensors of a call lie on one device.
void check_device(const TensorView& view, const TensorView& first, const char* name);

}  // namespace fastkd
