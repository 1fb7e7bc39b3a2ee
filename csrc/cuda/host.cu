#include "cuda/host.cuh"

#include <map>
#include <mutex>
#include <utility>

namespace fastkd {

namespace {

// Counters for is_last(), in slices: one for each stream that makes calls. They are no memory of PyTorch's
// allocator. A tensor that lives from one call to the next could lie in the private pool of a CUDA graph, or
// in a user's MemPool.
constexpr int kSlices = 64;
constexpr int64_t kSlice = 1 << 14;

#ifdef FASTKD_EMULATE

unsigned ticket_counters[kSlices * kSlice];

unsigned* first_counter(Stream) { return ticket_counters; }
Stream current_stream(int32_t) { return emulate::stream(); }
bool is_capturing(Stream) { return emulate::is_capturing(); }
void clear(void* counters, size_t bytes, Stream) { std::memset(counters, 0, bytes); }

#else

__device__ unsigned ticket_counters[kSlices * kSlice];  // each device has its own, zeros at first

void check(cudaError_t status, const char* name) {
  STD_TORCH_CHECK(status == cudaSuccess, name, ": ", cudaGetErrorString(status));
}

// Of the current device. Null for the stream that is another one in each thread: one slice would not do.
unsigned* first_counter(Stream stream) {
  if (stream == cudaStreamPerThread) return nullptr;
  void* first = nullptr;
  check(cudaGetSymbolAddress(&first, ticket_counters), "tickets");
  return static_cast<unsigned*>(first);
}

Stream current_stream(int32_t index) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  return static_cast<Stream>(stream);
}

bool is_capturing(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status), "tickets");
  return status != cudaStreamCaptureStatusNone;
}

void clear(void* counters, size_t bytes, Stream stream) {
  check(cudaMemsetAsync(counters, 0, bytes, stream), "tickets");
}

#endif

// The slice of a stream of the current device, whose index this is; null where there is none left.
unsigned* slice_of(int32_t index, Stream stream) {
  struct Slices {
    std::map<std::pair<int32_t, Stream>, unsigned*> of_stream;
    std::map<int32_t, int> taken;  // by the streams of a device
    std::mutex mutex;
  };
  static auto* slices = new Slices;  // never freed: calls may come while the process ends
  const std::lock_guard<std::mutex> lock(slices->mutex);
  const auto found = slices->of_stream.find({index, stream});
  if (found != slices->of_stream.end()) return found->second;
  int& taken = slices->taken[index];
  unsigned* first = taken < kSlices ? first_counter(stream) : nullptr;
  if (first != nullptr) first += kSlice * taken++;
  slices->of_stream.insert({{index, stream}, first});
  return first;
}

}  // namespace

#ifdef FASTKD_EMULATE

OnDevice::OnDevice(const TensorView& view)
    : index_(view.device_index), stream_(current_stream(view.device_index)) {}

#else

OnDevice::OnDevice(const TensorView& view)
    : index_(view.device_index), stream_(current_stream(view.device_index)), guard_(view.device_index) {}

void check_launch(const char* name, cudaError_t status) { check(status, name); }

void allow_shared(const char* name, const void* kernel, size_t bytes) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
        name);
}

#endif

Tickets OnDevice::tickets(int64_t count) const {
  const bool may_share = count <= kSlice && !is_capturing(stream_);
  Tickets tickets{may_share ? slice_of(index_, stream_) : nullptr, std::nullopt};
  if (tickets.first == nullptr) {
    tickets.memory = empty(&count, 1, DType::kFloat);  // 4 bytes each, like an unsigned
    tickets.first = static_cast<unsigned*>(tickets.memory->mutable_data_ptr());
    clear(tickets.first, static_cast<size_t>(count) * sizeof(unsigned), stream_);
  }
#ifdef FASTKD_EMULATE
  emulate::note_tickets(tickets.memory ? -1 : static_cast<int>((tickets.first - ticket_counters) / kSlice));
  for (int64_t i = 0; i < count; ++i)
    STD_TORCH_CHECK(tickets.first[i] == 0, "a kernel left a ticket that is not 0");
#endif
  return tickets;
}

void check_count(int64_t count) {
  constexpr int64_t kMost = 1 << 30;
  STD_TORCH_CHECK(count <= kMost, "a sample of ", count, " positions or channels is not served, at most ",
                  kMost);
}

unsigned grid_of(const char* name, int64_t blocks) {
  STD_TORCH_CHECK(blocks > 0 && blocks < int64_t{1} << 31, name, ": a grid of ", blocks,
                  " blocks is more than a GPU takes");
  return static_cast<unsigned>(blocks);
}

void check_device(const TensorView& view, const TensorView& first, const char* name) {
  STD_TORCH_CHECK(view.device_index == first.device_index, name, " lies on device ", view.device_index,
                  ", the first tensor on ", first.device_index);
}

}  // namespace fastkd
