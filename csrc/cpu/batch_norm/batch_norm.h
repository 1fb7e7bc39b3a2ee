// What batch_norm.cpp hands to the kernels of batch_norm.inl. A feature is `rows` rows of `channels` numbers,
// dense; where it has few channels, a row is several positions, each of whose channels counts as one of its
// own. Units are chunks of rows.
#pragma once

#include "cpu/kernel.h"

namespace fastkd {

struct NormRows {
  DType dtype;  // of x, residual, y, gradients; all else is float
  int64_t rows, channels;
  int64_t fold;   // positions of a row
  int64_t chunk;  // rows of one, the last may have fewer
};

struct NormArgs {
  NormRows size;
  const void* x;
  const void* residual;  // null if there is none
  void* y;
  const float *mean, *slope, *bias;  // y = (x - mean) * slope + bias
  float* parts;                      // (chunks, 2, channels): mean, and sum of the squared distances from it
  int32_t relu;
};

struct NormBackwardArgs {
  NormRows size;
  const void *grad, *x;
  const void* y;  // where the ReLU's result is positive its gradient passes; null: found out from x
  const float *mean, *slope, *bias;  // of the forward pass
  float* parts;                      // (chunks, 2, channels): sums of g and of g * (x - mean)
  void* passed;                      // g, the gradient before the ReLU; null unless a residual wants it
  const float *along, *constant;     // dx = g * slope - (x - mean) * along - constant
  void* dx;
  int32_t relu;
};

// x = relu(x + residual), in place.
struct JoinArgs {
  DType dtype;
  void* x;
  const void* residual;  // null if there is none
};

struct NormKernels {
  void (*moments)(const NormArgs&, int64_t begin, int64_t end);
  void (*apply)(const NormArgs&, int64_t begin, int64_t end);
  void (*sums)(const NormBackwardArgs&, int64_t begin, int64_t end);
  void (*gradient)(const NormBackwardArgs&, int64_t begin, int64_t end);
  void (*join)(const JoinArgs&, int64_t begin, int64_t end);  // units are numbers
};

}  // namespace fastkd
