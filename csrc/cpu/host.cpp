#include "cpu/host.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <new>

namespace fastkd {
namespace {

constexpr size_t kKeptBytes = size_t{4} << 20;
constexpr size_t kAlignment = 64;

struct ThreadBuffer {
  void* data = nullptr;
  size_t bytes = 0;
  ~ThreadBuffer() { ::operator delete(data, std::align_val_t{kAlignment}); }
};
thread_local ThreadBuffer thread_buffer;

}  // namespace

int64_t bytes_of(const Feature& x) { return x.batch * x.channels * x.positions * size_of(x.dtype); }

bool lies_by_planes(const Feature& x) {
  return (x.positions == 1 || (x.layout == Layout::kPlanes)) &&
         (x.channels == 1 || x.stride_c == x.positions) &&
         (x.batch == 1 || x.stride_n == x.channels * x.positions);
}

bool lies_by_positions(const Feature& x) {
  return (x.channels == 1 || x.stride_c == 1) &&
         (x.positions == 1 || (x.layout != Layout::kGeneric && x.stride_s == x.channels)) &&
         (x.batch == 1 || x.stride_n == x.channels * x.positions);
}

const void* matrix_of(const Tensor& tensor, DType dtype, int64_t rows, int64_t columns, const char* name) {
  const TensorView view = view_of(tensor, name);
  check_accumulation(view, dtype, name);
  STD_TORCH_CHECK(view.dim == 2 && view.sizes[0] == rows && view.sizes[1] == columns, name, " must be (",
                  rows, ", ", columns, ")");
  STD_TORCH_CHECK((columns == 1 || view.strides[1] == 1) && (rows == 1 || view.strides[0] == columns), name,
                  " must be dense");
  return view.data;
}

const float* vector_of(const Tensor& tensor, int64_t channels, const char* name) {
  const TensorView view = view_of(tensor, name);
  STD_TORCH_CHECK(view.dtype == DType::kFloat && view.dim == 1 && view.sizes[0] == channels &&
                      (channels == 1 || view.strides[0] == 1),
                  name, " must be float32, dense, one number a channel");
  return static_cast<const float*>(view.data);
}

double scalar_of(const Tensor& tensor, const char* name) {
  const TensorView view = view_of(tensor, name);
  for (int32_t d = 0; d < view.dim; ++d) STD_TORCH_CHECK(view.sizes[d] == 1, name, " must hold one number");
  switch (view.dtype) {
    case DType::kHalf:
      return static_cast<float>(*static_cast<const torch::headeronly::Half*>(view.data));
    case DType::kBFloat16:
      return static_cast<float>(*static_cast<const torch::headeronly::BFloat16*>(view.data));
    case DType::kFloat:
      return *static_cast<const float*>(view.data);
    default:
      return *static_cast<const double*>(view.data);
  }
}

PoolTables make_pool(const int64_t* in, const int64_t* out, bool max) {
  PoolTables pool;
  PoolPlan& plan = pool.plan;
  plan.active = 0;
  plan.max = max ? 1 : 0;
  plan.in_positions = plan.out_positions = 1;
  for (int d = 0; d < 3; ++d) {
    plan.in[d] = in[d];
    plan.out[d] = out[d];
    plan.begin[d] = plan.end[d] = nullptr;
    plan.in_positions *= in[d];
    plan.out_positions *= out[d];
    if (in[d] != out[d]) plan.active = 1;
  }
  if (!plan.active) return pool;
  pool.bounds.resize(static_cast<size_t>(2 * (out[0] + out[1] + out[2])));
  int64_t* table = pool.bounds.data();
  for (int d = 0; d < 3; ++d) {
    plan.begin[d] = table;
    plan.end[d] = table + out[d];
    for (int64_t i = 0; i < out[d]; ++i) {
      table[i] = i * in[d] / out[d];
      table[out[d] + i] = ((i + 1) * in[d] + out[d] - 1) / out[d];
    }
    table += 2 * out[d];
  }
  return pool;
}

Scratch::Scratch(size_t bytes) : owned_(bytes > kKeptBytes) {
  if (owned_) {
    data_ = ::operator new(bytes, std::align_val_t{kAlignment});
    return;
  }
  ThreadBuffer& buffer = thread_buffer;
  if (buffer.bytes < bytes) {
    ::operator delete(buffer.data, std::align_val_t{kAlignment});
    buffer.data = nullptr;
    buffer.bytes = 0;
    buffer.data = ::operator new(bytes, std::align_val_t{kAlignment});
    buffer.bytes = bytes;
  }
  data_ = buffer.data;
}

Scratch::~Scratch() {
  if (owned_) ::operator delete(data_, std::align_val_t{kAlignment});
}

}  // namespace fastkd
