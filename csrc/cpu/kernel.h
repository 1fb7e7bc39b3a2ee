// What the CPU operators and their kernels have in common, without PyTorch (see common/feature.h): storage
// types, pooling, pieces of scratch memory.
#pragma once

#include "common/feature.h"
#include "common/formulas.h"

namespace fastkd {

// Storage types of the 16-bit dtypes; vec.inl converts them.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Windows of an adaptive pooling from in[] to out[]: output i of dimension d covers [begin[d][i], end[d][i]).
// active is 0 when in and out are equal.
struct PoolPlan {
  int32_t active;
  int32_t max;  // max instead of average
  int64_t in[3], out[3];
  int64_t in_positions, out_positions;
  const int64_t* begin[3];
  const int64_t* end[3];
};

// Bytes of one piece of scratch memory for `count` numbers: whole cache lines, and one vector to spare.
static inline size_t scratch_piece(int64_t count, size_t size) {
  return (static_cast<size_t>(count) * size + 127) / 64 * 64;
}

}  // namespace fastkd
