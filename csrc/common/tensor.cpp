#include "common/tensor.h"

#include <torch/csrc/stable/ops.h>

namespace fastkd {
namespace {

#ifdef USE_CUDA
constexpr const char* kElsewhere = " must be on a CUDA device";
#else
constexpr const char* kElsewhere = " must be on the CPU";
#endif

// PyTorch chooses the codes of dtypes and devices; they are asked for once.
struct Codes {
  int32_t half = aoti_torch_dtype_float16();
  int32_t bfloat16 = aoti_torch_dtype_bfloat16();
  int32_t float32 = aoti_torch_dtype_float32();
  int32_t float64 = aoti_torch_dtype_float64();
#ifdef USE_CUDA
  int32_t device = aoti_torch_device_type_cuda();
#else
  int32_t device = aoti_torch_device_type_cpu();
#endif
};

const Codes& codes() {
  static const Codes c;
  return c;
}

int32_t code_of(DType dtype) {
  switch (dtype) {
    case DType::kHalf:
      return codes().half;
    case DType::kBFloat16:
      return codes().bfloat16;
    case DType::kFloat:
      return codes().float32;
    default:
      return codes().float64;
  }
}

Tensor empty_strided(const int64_t* sizes, const int64_t* strides, int64_t dim, DType dtype,
                     int32_t device_index) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes, strides, code_of(dtype), codes().device, device_index, &handle));
  return Tensor(handle);
}

// PyTorch's notion: some order of the dimensions makes the tensor contiguous; strides of dimensions of size 1
// do not matter.
bool is_dense(const TensorView& view) {
  int32_t order[kMaxDims];
  int32_t count = 0;
  for (int32_t d = 0; d < view.dim; ++d) {
    if (view.sizes[d] == 1) continue;
    int32_t at = count++;
    for (; at > 0 && view.strides[order[at - 1]] > view.strides[d]; --at) order[at] = order[at - 1];
    order[at] = d;
  }
  int64_t expected = 1;
  for (int32_t i = 0; i < count; ++i) {
    if (view.strides[order[i]] != expected) return false;
    expected *= view.sizes[order[i]];
  }
  return true;
}

// Whether positions follow each other at one stride, and which.
bool collapse(const Feature& x, int64_t* stride) {
  int64_t expected = -1;  // none yet: 0 is the stride of an expanded dimension
  *stride = 1;
  for (int d = 2; d >= 0; --d) {
    if (x.size[d] == 1) continue;
    if (expected < 0) {
      *stride = x.stride[d];
    } else if (x.stride[d] != expected) {
      return false;
    }
    expected = x.stride[d] * x.size[d];
  }
  return true;
}

Feature make_feature(const TensorView& view, bool has_channels, const char* name) {
  const int32_t first = has_channels ? 2 : 1;
  STD_TORCH_CHECK(view.dim > first && view.dim <= first + 3, name, " must have ", first + 1, " to ",
                  first + 3, " dimensions, got ", view.dim);
  Feature x;
  x.data = view.data;
  x.dtype = view.dtype;
  x.batch = view.sizes[0];
  x.stride_n = view.strides[0];
  x.channels = has_channels ? view.sizes[1] : 1;
  x.stride_c = has_channels ? view.strides[1] : 0;
  x.positions = 1;
  for (int32_t d = 0; d < 3; ++d) {
    const int32_t from = view.dim - 3 + d;
    x.size[d] = from >= first ? view.sizes[from] : 1;
    x.stride[d] = from >= first ? view.strides[from] : 0;
    x.positions *= x.size[d];
  }
  STD_TORCH_CHECK(x.batch > 0 && x.channels > 0 && x.positions > 0, name, " must not be empty");
  x.layout = Layout::kGeneric;
  if (collapse(x, &x.stride_s)) {
    if (x.channels > 1 && x.stride_c == 1 && (x.positions == 1 || x.stride_s != 1)) {
      x.layout = Layout::kChannelsLast;
    } else if (x.stride_s == 1) {
      x.layout = Layout::kPlanes;
    }
  }
  return x;
}

}  // namespace

TensorView view_of(const Tensor& tensor, const char* name) {
  const AtenTensorHandle handle = tensor.get();
  TensorView view;
  int32_t code = 0;
  int32_t device = 0;
  int64_t dim = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device));
  STD_TORCH_CHECK(device == codes().device, name, kElsewhere);
  view.device_index = 0;
#ifdef USE_CUDA
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &view.device_index));
#endif
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &code));
  if (code == codes().float32) {
    view.dtype = DType::kFloat;
  } else if (code == codes().bfloat16) {
    view.dtype = DType::kBFloat16;
  } else if (code == codes().half) {
    view.dtype = DType::kHalf;
  } else {
    STD_TORCH_CHECK(code == codes().float64, name, " must be float16, bfloat16, float32 or float64");
    view.dtype = DType::kDouble;
  }
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dim));
  STD_TORCH_CHECK(dim <= kMaxDims, name, " must have at most ", kMaxDims, " dimensions, got ", dim);
  view.dim = static_cast<int32_t>(dim);
  int64_t* sizes = nullptr;
  int64_t* strides = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides));
  for (int64_t d = 0; d < dim; ++d) {
    view.sizes[d] = sizes[d];
    view.strides[d] = strides[d];
  }
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle, &view.data));
  return view;
}

Feature feature_of(const TensorView& view, const char* name) { return make_feature(view, true, name); }

Feature map_of(const TensorView& view, const char* name) { return make_feature(view, false, name); }

void map_sizes(const TensorView& x, int64_t* sizes) {
  sizes[0] = x.sizes[0];
  for (int32_t d = 2; d < x.dim; ++d) sizes[d - 1] = x.sizes[d];
}

void check_same(const Feature& a, const Feature& b, const char* what) {
  STD_TORCH_CHECK(
      a.batch == b.batch && a.size[0] == b.size[0] && a.size[1] == b.size[1] && a.size[2] == b.size[2], what,
      " differ in batch or spatial size");
}

void check_accumulation(const TensorView& view, DType accumulation, const char* name) {
  STD_TORCH_CHECK(view.dtype == accumulation, name, " must be ",
                  accumulation == DType::kDouble ? "float64" : "float32");
}

void check_like(const TensorView& view, const TensorView& x, const char* name) {
  bool same = view.dtype == x.dtype && view.dim == x.dim;
  for (int32_t d = 0; same && d < x.dim; ++d) same = view.sizes[d] == x.sizes[d];
  STD_TORCH_CHECK(same, name, " must have the shape and dtype of the feature");
}

Tensor empty(const int64_t* sizes, int64_t dim, DType dtype, int32_t device_index) {
  int64_t strides[kMaxDims];
  int64_t stride = 1;
  for (int64_t d = dim - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= sizes[d];
  }
  return empty_strided(sizes, strides, dim, dtype, device_index);
}

Tensor empty_like(const Tensor& tensor, const TensorView& view) {
  if (!is_dense(view)) {
    const torch::stable::Tensor like =
        torch::stable::empty_like(torch::stable::Tensor(Tensor(tensor).release()));
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(like.get(), &handle));
    return Tensor(handle);
  }
  return empty_strided(view.sizes, view.strides, view.dim, view.dtype, view.device_index);
}

bool parse_switch(const Text& given, const char* name, const char* when_false, const char* when_true) {
  if (given.value == when_true) return true;
  STD_TORCH_CHECK(given.value == when_false, name, " must be \"", when_false, "\" or \"", when_true,
                  "\", got \"", given.value, "\"");
  return false;
}

}  // namespace fastkd
