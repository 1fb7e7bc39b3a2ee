// What attention.cpp hands to the kernels of attention.inl. Units are (sample, stage) pairs: unit u is stage
// u % stage_count of sample u / stage_count, so that equal shares of the units hold about equal work.
#pragma once

#include "common/attention_options.h"
#include "cpu/kernel.h"

namespace fastkd {

// One side of one stage.
struct AttentionSide {
  Feature x;
  PoolPlan pool;
  int64_t chunk;       // channels brought to scratch memory at a time, where pooling or the layout makes that
                       // necessary
  void* coefficients;  // (N, positions) of the accumulation dtype, or nullptr if not wanted
};

struct AttentionStage {
  AttentionSide student, teacher;
  Feature gradient;   // of the student, for the expected upstream gradient; data is null if not wanted
  int32_t streaming;  // of the gradient, past the caches
  double factor;      // of the stage's summed squares (or distances) in the loss
};

struct AttentionLossArgs {
  const AttentionStage* stages;
  int64_t stage_count;
  AttentionOptions options;
  DType accumulation;
  int32_t pool_before, l2, student_is_map, teacher_is_map;
  double upstream;  // expected
  double* partial;  // [stage][sample]: squared distance, or distance for l2
};

struct AttentionMapArgs {
  AttentionSide side;
  AttentionOptions options;
  DType accumulation;
  int32_t normalize;
  void* map;   // (N, positions)
  void* norm;  // (N), if normalize
};

struct AttentionMapBackwardArgs {
  AttentionSide side;
  Feature grad, map, norm, dx;
  AttentionOptions options;
  DType accumulation;
  int32_t normalize, streaming;
};

struct AttentionGradient {
  AttentionSide side;
  Feature coefficients, dx;
  int32_t is_map;  // x is a map: its gradient is the coefficient itself
  int32_t streaming;
};

struct AttentionLossBackwardArgs {
  const AttentionGradient* items;
  int64_t item_count;
  AttentionOptions options;
  DType accumulation;
  double grad;
};

struct AttentionKernels {
  void (*map)(const AttentionMapArgs&, int64_t begin, int64_t end, void* scratch);
  void (*map_backward)(const AttentionMapBackwardArgs&, int64_t begin, int64_t end, void* scratch);
  void (*loss)(const AttentionLossArgs&, int64_t begin, int64_t end, void* scratch);
  void (*loss_backward)(const AttentionLossBackwardArgs&, int64_t begin, int64_t end, void* scratch);
};

}  // namespace fastkd
