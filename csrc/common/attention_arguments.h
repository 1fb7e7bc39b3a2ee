// The options and numbers of attention maps and of the loss over them, as the operators get them.
#pragma once

#include "common/attention_options.h"
#include "common/tensor.h"

namespace fastkd {

inline AttentionOptions options_of(double p, bool is_signed, bool mean, double eps, bool add_eps) {
  STD_TORCH_CHECK(p >= 1 && p <= 16, "p must be from 1 to 16, got ", p);
  STD_TORCH_CHECK(eps >= 0, "eps must not be negative, got ", eps);
  return {p, eps, is_signed, mean, add_eps};
}

inline AttentionOptions options_of(double p, const Text& channel_reduce, bool is_signed, double eps,
                                   const Text& eps_mode) {
  return options_of(p, is_signed, parse_switch(channel_reduce, "channel_reduce", "sum", "mean"), eps,
                    parse_switch(eps_mode, "eps_mode", "clamp", "add"));
}

inline void check_options(int64_t options) {
  STD_TORCH_CHECK(options >= 0 && options < kOptionsEnd, "options must be bits below ", int64_t{kOptionsEnd},
                  ", got ", options);
}

// The numbers of the loss: the upstream gradient to prepare for, p, eps, the weight, and one weight a stage
// or none.
struct AttentionNumbers {
  double upstream, p, eps, weight;
  const double* weights;  // or nullptr
};

inline AttentionNumbers attention_numbers(const std::vector<double>& numbers, size_t stages) {
  STD_TORCH_CHECK(numbers.size() == 4 || numbers.size() == 4 + stages,
                  "numbers must hold the upstream gradient, p, eps, the weight, and one weight a stage (",
                  stages, ") or none, got ", numbers.size());
  return {numbers[0], numbers[1], numbers[2], numbers[3], numbers.size() > 4 ? &numbers[4] : nullptr};
}

}  // namespace fastkd
