// The options of FSP matrices and of the loss over them, for both libraries.
#pragma once

#include <string>

#include "common/tensor.h"

namespace fastkd {

// Bits of one integer; fastkd/_bits.py has the same table.
struct FspOption {
  enum : int64_t {
    kMaxPool = 1,         // pool_mode: "max", else "avg"
    kPairMean = 2,        // pair_reduce: "mean", else "sum"
    kFrobenius = 4,       // distance: "frobenius"
    kColumnL2 = 8,        // distance: "column_l2"
    kIeee = 16,           // precision: "ieee"
    kTf32 = 32,           // precision: "tf32"
    kTf32x3 = 48,         // precision: "tf32x3"
    kWithGrad = 64,       // with_grad
    kPrepare = 128,       // prepare
    kNegate = 256,        // negate
    kAGrad = 512,         // a_grad
    kBGrad = 1024,        // b_grad
    kTeacherGrad = 2048,  // teacher_grad
    kEnd = 4096,
  };
};

enum class FspDistance { kSquared, kFrobenius, kColumnL2 };
enum class FspPrecision { kNone, kIeee, kTf32, kTf32x3 };

struct FspOptions {
  bool max;        // pools by the maximum, else by the average
  bool pair_mean;  // of the pairs' terms, else the sum
  FspDistance distance;
  FspPrecision precision;
  bool with_grad, prepare, negate, a_grad, b_grad, teacher_grad;
};

static inline FspOptions fsp_options(int64_t bits) {
  STD_TORCH_CHECK(bits >= 0 && bits < FspOption::kEnd, "options must be bits below ",
                  int64_t{FspOption::kEnd}, ", got ", bits);
  const int64_t distance = bits & (FspOption::kFrobenius | FspOption::kColumnL2);
  STD_TORCH_CHECK(distance != (FspOption::kFrobenius | FspOption::kColumnL2), "options name no distance");
  FspOptions o;
  o.max = (bits & FspOption::kMaxPool) != 0;
  o.pair_mean = (bits & FspOption::kPairMean) != 0;
  o.distance = static_cast<FspDistance>(distance / FspOption::kFrobenius);
  o.precision = static_cast<FspPrecision>((bits & FspOption::kTf32x3) / FspOption::kIeee);
  o.with_grad = (bits & FspOption::kWithGrad) != 0;
  o.prepare = (bits & FspOption::kPrepare) != 0;
  o.negate = (bits & FspOption::kNegate) != 0;
  o.a_grad = (bits & FspOption::kAGrad) != 0;
  o.b_grad = (bits & FspOption::kBGrad) != 0;
  o.teacher_grad = (bits & FspOption::kTeacherGrad) != 0;
  return o;
}

// The numbers of the loss: the upstream gradient to prepare for, the weight, and one weight a pair or none.
struct FspNumbers {
  double upstream, weight;
  const double* weights;  // or nullptr
};

static inline FspNumbers fsp_numbers(const std::vector<double>& numbers, size_t pairs) {
  STD_TORCH_CHECK(numbers.size() == 2 || numbers.size() == 2 + pairs,
                  "numbers must hold the upstream gradient, the weight, and one weight a pair (", pairs,
                  ") or none, got ", numbers.size());
  return {numbers[0], numbers[1], numbers.size() > 2 ? &numbers[2] : nullptr};
}

// What a pair's distance is multiplied by.
static inline double pair_factor(const FspOptions& options, const FspNumbers& numbers, size_t pair,
                                 size_t pairs) {
  const double weight = numbers.weight * (numbers.weights ? numbers.weights[pair] : 1.0);
  return weight / (options.pair_mean ? static_cast<double>(pairs) : 1.0);
}

}  // namespace fastkd
