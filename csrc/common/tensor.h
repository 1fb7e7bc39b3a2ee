// What the operators of both libraries share on the host side: views of tensors as plain structs, checks,
// allocation. csrc/common/tensor.cpp is compiled into each library, for its own kind of device.
#pragma once

#include <string>
#include <vector>

#include "common/boxed.h"
#include "common/feature.h"

namespace fastkd {

constexpr int kMaxDims = 5;

struct TensorView {
  void* data;
  DType dtype;
  int32_t device_index;
  int32_t dim;
  int64_t sizes[kMaxDims];
  int64_t strides[kMaxDims];  // in elements
};

// A view of a tensor of a floating dtype on the library's kind of device; `name` is the argument, for the
// error.
TensorView view_of(const Tensor& tensor, const char* name);
// (N, C, *S), 3 to 5 dimensions, nothing empty.
Feature feature_of(const TensorView& view, const char* name);
// (N, *S), 2 to 4 dimensions, nothing empty.
Feature map_of(const TensorView& view, const char* name);

// float64 if any input is, else float32.
inline DType accumulation(DType a, DType b) {
  return a == DType::kDouble || b == DType::kDouble ? DType::kDouble : DType::kFloat;
}

// The sizes of a map of x: (N, *S).
void map_sizes(const TensorView& x, int64_t* sizes);
// Each raises unless it holds: equal batch and spatial sizes ("grad and x" differ ...); the dtype of
// accumulation; x's shape and dtype.
void check_same(const Feature& a, const Feature& b, const char* what);
void check_accumulation(const TensorView& view, DType accumulation, const char* name);
void check_like(const TensorView& view, const TensorView& x, const char* name);

// Contiguous and uninitialized.
Tensor empty(const int64_t* sizes, int64_t dim, DType dtype, int32_t device_index = 0);
// As aten::empty_like with preserve_format, without a trip through the dispatcher for dense tensors.
Tensor empty_like(const Tensor& tensor, const TensorView& view);
// A string argument of an operator. PyTorch's own conversion, to std::string, leaks every one in the headers
// of 2.13 and older.
struct Text {
  std::string value;
};

bool parse_switch(const Text& given, const char* name, const char* when_false, const char* when_true);

}  // namespace fastkd

template <>
struct torch::stable::detail::ToImpl<fastkd::Text> {
  static fastkd::Text call(StableIValue value, uint64_t, bool) {
    const StringHandle handle = torch::stable::detail::to<StringHandle>(value);
    const char* data = nullptr;
    size_t length = 0;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    fastkd::Text text{std::string(data, length)};
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};
