// The gradients of features, planned from those of their FSP matrices.
#pragma once

#include "cuda/fsp/plan.cuh"

namespace fastkd {

// What a pair adds to a feature's gradient. own_dim: the dimension of m, (N, Ca, Cb), that holds the
// feature's own channels.
struct FspTerm {
  Feature other;
  TensorView m;
  int own_dim;
};

void check_matrix_grad(const FspCall& call, const TensorView& m, const Feature& a, const Feature& b,
                       const char* name);

class FspGradients {
 public:
  explicit FspGradients(FspCall& call) : call_(call) {}

  // A feature whose gradient is wanted, and at most two terms.
  void add(const Tensor& x, const TensorView& view, const Feature& feature,
           const std::vector<FspTerm>& terms);
  // All of them, times `factor` and, on the device, `upstream`.
  std::vector<Tensor> run(double factor, const TensorView* upstream);

 private:
  // The gradient of what the feature was pooled to, made by a launch before; how it is gathered.
  Gather coarse(const Feature& feature, const FspTerm& term, const int64_t* grid, const Operand& own);

  FspCall& call_;
  int64_t samples_ = 0;
  std::vector<GradientArguments> before_, items_;
  std::vector<Tensor> out_;
};

}  // namespace fastkd
