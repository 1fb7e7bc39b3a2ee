// The options of attention maps and of the loss over them, for both libraries.
#pragma once

#include <cstdint>

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

}  // namespace fastkd
