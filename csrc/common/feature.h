// How a tensor of features lies in memory, as plain data: what the host side hands to kernels.
//
// Kernels of the CPU (*.inl) are compiled once per instruction set. An inline function or a template of a
// header that such a file used would be emitted there as a weak symbol holding, say, AVX-512 code, and the
// linker may keep that copy for every caller. So the headers that they include hold structs without member
// functions and functions declared static, and setup.py hides PyTorch's headers from them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastkd {

enum class DType : int32_t { kHalf, kBFloat16, kFloat, kDouble };

// Bytes of one number.
static inline int64_t size_of(DType dtype) {
  return dtype == DType::kDouble ? 8 : dtype == DType::kFloat ? 4 : 2;
}

// kPlanes: the positions of a channel are one run of stride 1. kChannelsLast: the channels of a position have
// stride 1, and the positions one common stride (stride_s). kGeneric: anything else (sliced, expanded,
// permuted); read it by size[] and stride[].
enum class Layout : int32_t { kPlanes, kChannelsLast, kGeneric };

// A tensor (N, C, *S), or a map (N, *S) with channels = 1. Element (n, c, d, h, w) lies at
// n * stride_n + c * stride_c + d * stride[0] + h * stride[1] + w * stride[2]; absent spatial dimensions are
// leading ones of size 1.
struct Feature {
  void* data;
  DType dtype;
  Layout layout;
  int64_t batch, channels, positions;
  int64_t stride_n, stride_c;
  int64_t stride_s;  // of kPlanes (1) and kChannelsLast only
  int64_t size[3], stride[3];
};

}  // namespace fastkd
