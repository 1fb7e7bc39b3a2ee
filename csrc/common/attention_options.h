// The options of attention maps and of the loss over them, for both libraries.
#pragma once

#include <cmath>

#include "common/tensor.h"

namespace fastkd {

// The loss's options, bits of one integer; fastkd/_bits.py has the same table with the values' names.
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
  kStudentGrad = 512,   // student_grad
  kTeacherGrad = 1024,  // teacher_grad
  kPrepare = 2048,      // prepare
  kOptionsEnd = 4096,
};

// How an attention map is made: the power |x|^p (x^p if is_signed), its sum or mean over the channels, and
// the normalization over the positions.
struct AttentionOptions {
  double p;
  double eps;
  int32_t is_signed;
  int32_t mean;     // over channels; else the sum
  int32_t add_eps;  // divide by norm + eps; else by max(norm, eps)
};

static inline AttentionOptions options_of(double p, bool is_signed, bool mean, double eps, bool add_eps) {
  STD_TORCH_CHECK(p >= 1 && p <= 16, "p must be from 1 to 16, got ", p);
  STD_TORCH_CHECK(eps >= 0, "eps must not be negative, got ", eps);
  return {p, eps, is_signed, mean, add_eps};
}

static inline AttentionOptions options_of(double p, const Text& channel_reduce, bool is_signed, double eps,
                                          const Text& eps_mode) {
  return options_of(p, is_signed, parse_switch(channel_reduce, "channel_reduce", "sum", "mean"), eps,
                    parse_switch(eps_mode, "eps_mode", "clamp", "add"));
}

static inline void check_options(int64_t options) {
  STD_TORCH_CHECK(options >= 0 && options < kOptionsEnd, "options must be bits below ", int64_t{kOptionsEnd},
                  ", got ", options);
}

// The numbers of the loss: the upstream gradient to prepare for, p, eps, the weight, and one weight a stage
// or none.
struct AttentionNumbers {
  double upstream, p, eps, weight;
  const double* weights;  // or nullptr
};

static inline AttentionNumbers attention_numbers(const std::vector<double>& numbers, size_t stages) {
  STD_TORCH_CHECK(numbers.size() == 4 || numbers.size() == 4 + stages,
                  "numbers must hold the upstream gradient, p, eps, the weight, and one weight a stage (",
                  stages, ") or none, got ", numbers.size());
  return {numbers[0], numbers[1], numbers[2], numbers[3], numbers.size() > 4 ? &numbers[4] : nullptr};
}

}  // namespace fastkd
