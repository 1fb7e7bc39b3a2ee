#include "cuda/host.cuh"

#include <map>
#include <mutex>
#include <utility>

namespace fastkd {

#ifdef FASTKD_EMULATE

OnDevice::OnDevice(const TensorView& view) : index_(view.device_index), stream_(nullptr) {}

Tensor OnDevice::tickets(int64_t count) const {
  static Tensor kept = [] {
    const int64_t all = 1 << 16;
    Tensor zeros = fastkd::empty(&all, 1, DType::kFloat);
    std::memset(zeros.mutable_data_ptr(), 0, all * sizeof(float));
    return zeros;
  }();
  STD_TORCH_CHECK(count <= kept.numel(), "more tickets than the emulation has");
  const auto* first = static_cast<const unsigned*>(kept.const_data_ptr());
  for (int64_t i = 0; i < count; ++i) STD_TORCH_CHECK(first[i] == 0, "a kernel left a ticket that is not 0");
  return kept;
}

#else

namespace {

void check(cudaError_t status, const char* name) { STD_TORCH_CHECK(status == cudaSuccess, name, ": ", cudaGetErrorString(status)); }

Stream current_stream(int32_t index) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  return static_cast<Stream>(stream);
}

}  // namespace

OnDevice::OnDevice(const TensorView& view)
    : index_(view.device_index), stream_(current_stream(view.device_index)), guard_(view.device_index) {}

Tensor OnDevice::tickets(int64_t count) const {
  const auto zeros = [&](int64_t size) {
    Tensor made = empty(&size, 1, DType::kFloat);  // 4 bytes each, like an unsigned
    check(cudaMemsetAsync(made.mutable_data_ptr(), 0, static_cast<size_t>(size) * sizeof(unsigned), stream_), "tickets");
    return made;
  };
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream_, &capturing), "tickets");
  if (capturing != cudaStreamCaptureStatusNone) return zeros(count);
  using Key = std::pair<int32_t, Stream>;
  // never freed: at exit the allocator may be gone before this is
  static auto* kept = new std::map<Key, Tensor>;
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = kept->find({index_, stream_});
  if (found == kept->end() || found->second.numel() < count) {
    const int64_t size = count < 4096 ? 4096 : count;
    found = kept->insert_or_assign(Key{index_, stream_}, zeros(size)).first;
  }
  return found->second;
}

void check_launch(const char* name, cudaError_t status) { check(status, name); }

void allow_shared(const char* name, const void* kernel, size_t bytes) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)), name);
}

#endif

unsigned* tickets_of(const Tensor& tickets) { return static_cast<unsigned*>(tickets.mutable_data_ptr()); }

unsigned grid_of(const char* name, int64_t blocks) {
  STD_TORCH_CHECK(blocks > 0 && blocks < int64_t{1} << 31, name, ": a grid of ", blocks, " blocks is more than a GPU takes");
  return static_cast<unsigned>(blocks);
}

void check_device(const TensorView& view, const TensorView& first, const char* name) {
  STD_TORCH_CHECK(view.device_index == first.device_index, name, " lies on device ", view.device_index, ", the first tensor on ",
                  first.device_index);
}

}  // namespace fastkd
