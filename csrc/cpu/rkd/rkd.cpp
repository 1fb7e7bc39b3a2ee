// Relations between the samples of a batch: allocation and the division among threads. The passes are in
// rkd.inl, the schemas in fastkd/ops/rkd.py.
#include "cpu/rkd/rkd.h"

#include <cstring>
#include <tuple>

#include "cpu/dispatch.h"
#include "cpu/host.h"

namespace fastkd {
namespace {

Tensor rkd_lengths(const Tensor& x) {
  const TensorView view = view_of(x, "x");
  STD_TORCH_CHECK(view.dim == 2, "x must have two dimensions");
  const int64_t n = view.sizes[0], shape[2] = {n, n};
  RkdLengthsArgs args = {n, view.sizes[1], nullptr, nullptr};
  args.x = static_cast<const float*>(matrix_of(x, DType::kFloat, n, args.width, "x"));
  Tensor result = empty(shape, 2, DType::kDouble);
  args.lengths = static_cast<double*>(result.mutable_data_ptr());
  const auto run = kernels().rkd.lengths;
  // The first samples have the most pairs: a unit is one of them and one of the last.
  parallel_units((n + 1) / 2, n * args.width, 0, [&](int64_t begin, int64_t end, void*) {
    run(args, begin, end);
    run(args, n - end, n - begin);
  });
  return result;
}

RkdSide side_of(const Tensor& products, const Tensor& inverses, int64_t n, Tensor& sums, bool needed,
                const char* products_name, const char* inverses_name) {
  RkdSide side = {};
  side.products = static_cast<const double*>(matrix_of(products, DType::kDouble, n, n, products_name));
  side.inverses = static_cast<const double*>(matrix_of(inverses, DType::kDouble, n, n, inverses_name));
  if (needed) {
    side.sums = static_cast<double*>(sums.mutable_data_ptr());
    std::memset(side.sums, 0, static_cast<size_t>(n * n) * sizeof(double));
  }
  return side;
}

std::tuple<Tensor, Tensor, Tensor> rkd_angles(const Tensor& s_products, const Tensor& s_inverses,
                                              const Tensor& t_products, const Tensor& t_inverses, bool need_s,
                                              bool need_t) {
  const TensorView view = view_of(s_products, "s_products");
  STD_TORCH_CHECK(view.dim == 2, "s_products must have two dimensions");
  const int64_t n = view.sizes[0], shape[3] = {3, n, n}, none = 0;
  Tensor s_sums = need_s ? empty(shape, 3, DType::kDouble) : empty(&none, 1, DType::kDouble);
  Tensor t_sums = need_t ? empty(shape, 3, DType::kDouble) : empty(&none, 1, DType::kDouble);
  std::vector<double> losses(static_cast<size_t>(n));
  const RkdAnglesArgs args = {
      n, side_of(s_products, s_inverses, n, s_sums, need_s, "s_products", "s_inverses"),
      side_of(t_products, t_inverses, n, t_sums, need_t, "t_products", "t_inverses"), losses.data()};
  const auto run = kernels().rkd.angles;
  parallel_units(n, n * n, 0, [&](int64_t begin, int64_t end, void*) { run(args, begin, end); });
  Tensor loss = empty(nullptr, 0, DType::kDouble);
  double total = 0;
  for (double part : losses) total += part;
  *static_cast<double*>(loss.mutable_data_ptr()) = total;
  return {std::move(loss), std::move(s_sums), std::move(t_sums)};
}

}  // namespace
}  // namespace fastkd

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("rkd_lengths", FASTKD_BOX(fastkd::rkd_lengths));
  m.impl("rkd_angles", FASTKD_BOX(fastkd::rkd_angles));
}
