// What rkd.cpp hands to the kernels of rkd.inl: matrices over the pairs of `count` samples, dense, in double.
#pragma once

#include "cpu/kernel.h"

namespace fastkd {

struct RkdLengthsArgs {
  int64_t count, width;
  const float* x;   // (count, width)
  double* lengths;  // (count, count): |x_i - x_j|
};

struct RkdSide {
  const double* products;  // <x_i, x_j>
  const double* inverses;  // 1 / |x_i - x_j|, 0 for equal samples
  double* sums;            // three matrices, see rkd_angles; null if no gradient is wanted
};

struct RkdAnglesArgs {
  int64_t count;
  RkdSide student, teacher;
  double* losses;  // (count): the part of each sample i
};

struct RkdKernels {
  void (*lengths)(const RkdLengthsArgs&, int64_t begin, int64_t end);  // of the pairs i < j with i in there
  void (*angles)(const RkdAnglesArgs&, int64_t begin, int64_t end);    // of the samples i in there
};

}  // namespace fastkd
