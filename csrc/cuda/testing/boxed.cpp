// Empty in every build but the tests' (see emulate.h): an operator, one of whose arguments cannot be
// converted.
#ifdef FASTKD_EMULATE
#include <stdexcept>

#include "common/tensor.h"

namespace fastkd {
namespace {

struct Refused {};

Tensor refuse(const Tensor& a, const Tensors&, Refused, const Tensor&, const std::optional<Tensor>&,
              const Tensors&, const Text&) {
  return a;
}

}  // namespace
}  // namespace fastkd

template <>
struct torch::stable::detail::ToImpl<fastkd::Refused> {
  static fastkd::Refused call(StableIValue, uint64_t, bool) { throw std::runtime_error("refused"); }
};

STABLE_TORCH_LIBRARY(fastkd_testing, m) {
  m.def("refuse(Tensor a, Tensor[] b, int refused, Tensor c, Tensor? d, Tensor[] e, str f) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fastkd_testing, CPU, m) { m.impl("refuse", FASTKD_BOX(fastkd::refuse)); }
#endif
