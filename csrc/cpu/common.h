// What the CPU operators share on the host side: views of tensors as plain structs, checks, allocation, threads and their scratch memory.
//
// Kernels (*.inl) are compiled once per instruction set. An inline function or a template of this header that such a file used would be
// emitted there as a weak symbol holding, say, AVX-512 code, and the linker may keep that copy for every caller. So the structs below are
// plain data without member functions, and kernels use nothing else of this header but functions declared static.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace fastkd {

using torch::stable::Tensor;

enum class DType : int32_t { kHalf, kBFloat16, kFloat, kDouble };

// Storage types of the 16-bit dtypes; vec.inl converts them.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

constexpr int kMaxDims = 5;

struct TensorView {
  void* data;
  DType dtype;
  int32_t dim;
  int64_t sizes[kMaxDims];
  int64_t strides[kMaxDims];  // in elements
};

// kPlanes: the positions of a channel are one run of stride 1. kChannelsLast: the channels of a position have stride 1, and the positions
// one common stride (stride_s). kGeneric: anything else (sliced, expanded, permuted); walk size[] and stride[].
enum class Layout : int32_t { kPlanes, kChannelsLast, kGeneric };

// A tensor (N, C, *S), or a map (N, *S) with channels = 1. Element (n, c, d, h, w) lies at
// n * stride_n + c * stride_c + d * stride[0] + h * stride[1] + w * stride[2]; absent spatial dimensions are leading ones of size 1.
struct Feature {
  void* data;
  DType dtype;
  Layout layout;
  int64_t batch, channels, positions;
  int64_t stride_n, stride_c;
  int64_t stride_s;  // of kPlanes (1) and kChannelsLast only
  int64_t size[3], stride[3];
};

// Windows of an adaptive pooling from in[] to out[]: output i of dimension d covers [begin[d][i], end[d][i]). active is 0 when in and out
// are equal.
struct PoolPlan {
  int32_t active;
  int32_t max;  // max instead of average
  int64_t in[3], out[3];
  int64_t in_positions, out_positions;
  const int64_t* begin[3];
  const int64_t* end[3];
};

// Owns the tables of a PoolPlan. Movable; the plan's pointers stay valid.
struct PoolTables {
  std::vector<int64_t> bounds;
  PoolPlan plan;
};
PoolTables make_pool(const int64_t* in, const int64_t* out, bool max);

// A view of a CPU tensor of a floating dtype; `name` is the argument, for the error.
TensorView view_of(const Tensor& tensor, const char* name);
// (N, C, *S), 3 to 5 dimensions, nothing empty.
Feature feature_of(const TensorView& view, const char* name);
// (N, *S), 2 to 4 dimensions, nothing empty.
Feature map_of(const TensorView& view, const char* name);

// float64 if any input is, else float32.
inline DType accumulation(DType a, DType b) { return a == DType::kDouble || b == DType::kDouble ? DType::kDouble : DType::kFloat; }

// A gradient this large is written past the caches: it would not stay there until anyone reads it, and a line that is written in the cache
// is first read from memory.
constexpr int64_t kStreamingBytes = 1 << 20;
int64_t bytes_of(const Feature& x);

// Contiguous and uninitialized.
Tensor empty(const int64_t* sizes, int64_t dim, DType dtype);
// As aten::empty_like with preserve_format, without a trip through the dispatcher for dense tensors.
Tensor empty_like(const Tensor& tensor, const TensorView& view);
// The value of a 0-dim (or one-element) tensor.
double scalar_of(const Tensor& tensor, const char* name);

// A string argument of an operator. PyTorch's own conversion, to std::string, leaks every one in the headers of 2.13 and older.
struct Text {
  std::string value;
};

bool parse_switch(const Text& given, const char* name, const char* when_false, const char* when_true);

// Bytes of one piece of scratch memory for `count` numbers: whole cache lines, and one vector to spare. (Static: kernels may use it.)
static inline size_t scratch_piece(int64_t count, size_t size) { return (static_cast<size_t>(count) * size + 127) / 64 * 64; }

// 64-byte aligned memory of the calling thread, kept for the next call unless large. One at a time per thread.
class Scratch {
 public:
  explicit Scratch(size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
  bool owned_;
};

// f(begin, end, scratch) over parts of [0, units). A thread gets at least as many units as hold kGrainElements elements, since starting one
// costs about as much as processing those. What f computes for a unit must not depend on how units are divided.
constexpr int64_t kGrainElements = 32768;
template <class F>
void parallel_units(int64_t units, int64_t elements_per_unit, size_t scratch_bytes, const F& f) {
  const int64_t grain = elements_per_unit >= kGrainElements ? 1 : kGrainElements / (elements_per_unit > 0 ? elements_per_unit : 1);
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    Scratch scratch(scratch_bytes);
    f(begin, end, scratch.data());
  });
}

}  // namespace fastkd

template <>
struct torch::stable::detail::ToImpl<fastkd::Text> {
  static fastkd::Text call(StableIValue value, uint64_t, bool) {
    const StringHandle handle = torch::stable::detail::to<StringHandle>(value);
    const char* data = nullptr;
    size_t length = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    fastkd::Text text{std::string(data, length)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};
