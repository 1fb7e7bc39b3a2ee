// What sakd.cpp hands to the kernels of sakd.inl: a stage of student and teacher, whose maps are square and
// of one size.
#pragma once

#include "cpu/kernel.h"

namespace fastkd {

struct SakdSide {
  DType dtype;  // float16, bfloat16 or float32
  bool planes;  // positions of a channel follow each other; else the channels of a position do
  int64_t channels;
  const void* data;  // dense
  float* grad;       // lies in memory as data does; null where none is wanted
  bool streaming;    // it is written past the caches, and each run of positions or channels begins a line
};

struct SakdArgs {
  int64_t side;  // of the maps
  SakdSide student, teacher;
  float slope;   // a gradient by a difference of maps, divided by it
  double* sums;  // of each sample: squared differences of the maps
};

// Rows of a matrix in scratch memory begin at multiples of so many numbers, whole vectors of any code path.
constexpr int64_t kSakdAlign = 16;
constexpr int64_t kSakdMatrices = 12;  // four of each side, and four more
static inline int64_t sakd_row(int64_t side) { return (side + kSakdAlign - 1) / kSakdAlign * kSakdAlign; }
static inline size_t sakd_scratch(int64_t side) {
  return static_cast<size_t>(kSakdMatrices * side * sakd_row(side)) * sizeof(float);
}

struct SakdKernels {
  void (*samples)(const SakdArgs&, int64_t begin, int64_t end, void* scratch);
};

}  // namespace fastkd
