// What pooled.cpp hands to the kernels of pooled.inl: a dense feature, its mean of squares over the channels
// and its mean over space.
#pragma once

#include "cpu/kernel.h"

namespace fastkd {

struct PooledArgs {
  DType dtype;  // float16, bfloat16 or float32
  bool planes;  // positions of a channel follow each other; else the channels of a position do
  int64_t channels, positions;
  const void* data;
  float *map, *mean;                  // (batch, positions), (batch, channels)
  const float *map_grad, *mean_grad;  // of the same shapes; either may be null
  void* grad;                         // as data
};

struct PooledKernels {
  void (*forward)(const PooledArgs&, int64_t begin, int64_t end);  // of the samples in there
  void (*backward)(const PooledArgs&, int64_t begin, int64_t end);
};

}  // namespace fastkd
