// The formulas that CPU and GPU kernels have in common. Functions are static, as kernels of the CPU need them
// (see feature.h).
#pragma once

#ifdef __CUDACC__
#define FASTKD_FORMULA static __host__ __device__ __forceinline__
#else
#define FASTKD_FORMULA static inline
#endif

namespace fastkd {

// The norm of a map q over the positions and what follows from it; q is the mean over channels, or their sum.
struct Norm {
  double norm;
  double divisor;  // of the sums over channels: the normalization's and, for "mean", the number of channels
  double reciprocal;  // 1 / divisor
  // dq = (g - y * <g, y> * along) * scale for the gradient g of the normalized map y; without the subtraction
  // where the divisor does not depend on q.
  double scale, along;
  bool has_along;
};

// reduction: what the sums over channels are divided by, 1 or their number.
FASTKD_FORMULA Norm norm_from(double norm, double reduction, double eps, bool add_eps) {
  Norm r;
  r.norm = norm;
  r.along = 1;
  double divisor;
  if (add_eps) {
    divisor = norm + eps;
    r.has_along = true;
    r.along = norm == 0 ? 0 : 1 + eps / norm;  // times a NaN it is NaN, as in PyTorch
  } else {
    divisor = norm < eps ? eps : norm;  // a NaN stays
    r.has_along = norm > eps;  // at the very bound PyTorch 2.15 agrees, older ones keep the second term
  }
  r.scale = 1 / divisor;
  if (add_eps && divisor == 0)
    r.scale = __builtin_nan("");  // as in PyTorch, where 0 / 0 reaches the gradient
  r.divisor = divisor * reduction;
  r.reciprocal = 1 / r.divisor;
  return r;
}

}  // namespace fastkd
