// What attention.cpp hands to the kernels of attention.inl. Units are (sample, stage) pairs: unit u is stage u % stage_count of sample u /
// stage_count, so that equal shares of the units hold about equal work.
#pragma once

#include "common.h"

namespace fastkd {

// The loss's switches, bits of one integer; fastkd/ops/attention.py has the same table with the values' names.
enum AttentionSwitch : int64_t {
  kMean = 1,            // channel_reduce: "mean", else "sum"
  kSigned = 2,          // signed
  kAddEps = 4,          // eps_mode: "add", else "clamp"
  kPoolBefore = 8,      // pool: "before", else "after"
  kPoolMax = 16,        // pool_mode: "max", else "avg"
  kL2 = 32,             // difference: "l2", else "squared"
  kStageMean = 64,      // stage_reduce: "mean", else "sum"
  kTeacherIsMap = 128,  // teacher_is_map
  kStudentIsMap = 256,  // student_is_map
  kSwitchesEnd = 512,
};

// h and the map's energy |x|^p (x^p if is_signed), and the normalization.
struct AttentionOptions {
  double p;
  double eps;
  int32_t is_signed;
  int32_t mean;     // over channels; else the sum
  int32_t add_eps;  // divide by norm + eps; else by max(norm, eps)
};

// One side of one stage.
struct AttentionSide {
  Feature x;
  PoolPlan pool;
  int64_t chunk;       // channels brought to scratch memory at a time, where pooling or the layout makes that necessary
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

// What the host side of other operations over maps shares (attention.cpp).
AttentionOptions options_of(double p, bool is_signed, bool mean, double eps, bool add_eps);
AttentionSide side_of(const Feature& x, const PoolPlan& pool);
// Scratch memory that a side needs: `maps` maps of its positions, and for the chunks if it is not read in place.
size_t scratch_of(const AttentionSide& side, int64_t maps, bool in_place, size_t size);
size_t size_of(DType accumulation);
// The sizes of a map of x: (N, *S).
void map_sizes(const TensorView& x, int64_t* sizes);
// Checks grad, map and norm against x and each other; `out` is x's gradient, to be written.
AttentionMapBackwardArgs map_backward_args(const Tensor& grad, const TensorView& x, const Tensor& map, const Tensor& norm,
                                           const AttentionOptions& options, bool normalize, const Tensor& out);

}  // namespace fastkd
