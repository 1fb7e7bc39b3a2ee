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
// Counters of calls that are captured in CUDA graphs, which then need no clearing at each replay: 4 MiB,
// enough for 2700 captured losses of three stages and 128 samples.
constexpr int64_t kCaptured = 1 << 20;
constexpr int64_t kCounters = kSlices * kSlice + kCaptured;

#ifdef FASTKD_EMULATE

unsigned ticket_counters[kCounters];

unsigned* first_counter() { return ticket_counters; }
bool is_shared_by_threads(Stream) { return false; }
Stream current_stream(int32_t) { return emulate::stream(); }
bool is_capturing(Stream) { return emulate::is_capturing(); }
void clear(void* counters, size_t bytes, Stream) { std::memset(counters, 0, bytes); }

#else

__device__ unsigned ticket_counters[kCounters];  // each device has its own, zeros at first

void check(cudaError_t status, const char* name) {
  STD_TORCH_CHECK(status == cudaSuccess, name, ": ", cudaGetErrorString(status));
}

// Of the current device. While a call is captured this could load the library's code, which CUDA refuses.
unsigned* first_counter() {
  void* first = nullptr;
  check(cudaGetSymbolAddress(&first, ticket_counters), "tickets");
  return static_cast<unsigned*>(first);
}

// Whether this handle stands for another stream in each thread.
bool is_shared_by_threads(Stream stream) { return stream == cudaStreamPerThread; }

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

// Which counters of a device are in use.
struct Taken {
  unsigned* first = nullptr;  // null until a call outside of captures has asked for it
  std::map<Stream, unsigned*> of_stream;
  int slices = 0;
  int64_t captured = 0;
};
struct AllTaken {
  std::map<int32_t, Taken> of_device;
  std::mutex mutex;
};
AllTaken& all_taken() {
  static auto* all = new AllTaken;  // never freed: calls may come while the process ends
  return *all;
}

// The slice of a stream of the current device, whose index this is; null where there is none left.
unsigned* slice_of(int32_t index, Stream stream) {
  AllTaken& all = all_taken();
  const std::lock_guard<std::mutex> lock(all.mutex);
  Taken& taken = all.of_device[index];
  const auto found = taken.of_stream.find(stream);
  if (found != taken.of_stream.end()) return found->second;
  unsigned* slice = nullptr;
  if (!is_shared_by_threads(stream) && taken.slices < kSlices) {  // one slice would not do for those
    if (taken.first == nullptr) taken.first = first_counter();
    slice = taken.first + kSlice * taken.slices++;
  }
  taken.of_stream.insert({stream, slice});
  return slice;
}

// Counters of a call that is captured, which keeps them for as long as the process lives, since nobody says
// when a graph is given up; null where there are none left. A graph is not replayed beside itself.
unsigned* captured_counters(int32_t index, int64_t count) {
  AllTaken& all = all_taken();
  const std::lock_guard<std::mutex> lock(all.mutex);
  Taken& taken = all.of_device[index];
  if (taken.first == nullptr || taken.captured + count > kCaptured) return nullptr;
  unsigned* counters = taken.first + kSlices * kSlice + taken.captured;
  taken.captured += count;
  return counters;
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
  Tickets tickets{nullptr, std::nullopt};
  if (is_capturing(stream_)) {
    tickets.first = captured_counters(index_, count);
  } else if (count <= kSlice) {
    tickets.first = slice_of(index_, stream_);
  }
  if (tickets.first == nullptr) {
    tickets.memory = empty(&count, 1, DType::kFloat);  // 4 bytes each, like an unsigned
    tickets.first = static_cast<unsigned*>(tickets.memory->mutable_data_ptr());
    clear(tickets.first, static_cast<size_t>(count) * sizeof(unsigned), stream_);
  }
#ifdef FASTKD_EMULATE
  const int64_t at = tickets.first - ticket_counters, shared = kSlices * kSlice;
  emulate::note_tickets(tickets.memory ? -1
                                       : static_cast<int>(at < shared ? at / kSlice : kSlices + at - shared));
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
