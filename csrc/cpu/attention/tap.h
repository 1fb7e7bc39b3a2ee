// What tap.cpp hands to the kernels of tap.inl. Units are samples.
#pragma once

#include "cpu/attention/attention.h"

namespace fastkd {

struct ReluTapArgs {
  Feature x, residual;  // residual.data is null if there is none
  AttentionSide y;
  AttentionOptions options;
  DType accumulation;
  void* map;   // (N, positions)
  void* norm;  // (N)
};

struct TapBackwardArgs {
  AttentionMapBackwardArgs map;  // of x, or of the ReLU's result
  Feature grad;                  // what else arrives at x
  int32_t relu;                  // dx is zero where x is
};

struct TapKernels {
  void (*relu)(const ReluTapArgs&, int64_t begin, int64_t end, void* scratch);
  void (*backward)(const TapBackwardArgs&, int64_t begin, int64_t end, void* scratch);
};

}  // namespace fastkd
