// The options of attention maps and of the loss over them, for both libraries.
#pragma once

#include <cmath>

#include "common/tensor.h"

namespace fastkd {

// The loss's switches, bits of one integer; fastkd/ops/attention.py has the same table with the values'
// names.
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

static inline void check_switches(int64_t switches) {
  STD_TORCH_CHECK(switches >= 0 && switches < kSwitchesEnd, "switches must be bits below ",
                  int64_t{kSwitchesEnd}, ", got ", switches);
}

}  // namespace fastkd
