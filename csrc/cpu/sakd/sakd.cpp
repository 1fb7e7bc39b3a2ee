// Self-attention distillation on a CPU: checks, allocation and the division among threads. The passes are in
// sakd.inl, the schema in fastkd/ops/sakd.py.
#include "cpu/sakd/sakd.h"

#include <tuple>

#include "cpu/dispatch.h"
#include "cpu/host.h"
#include "cpu/memory.h"

namespace fastkd {
namespace {

SakdSide side_of(const Tensor& x, const TensorView& view, const Feature& shape, const char* name, bool needed,
                 std::vector<Tensor>& grads) {
  STD_TORCH_CHECK(view.dtype != DType::kDouble, name, " must be float16, bfloat16 or float32");
  SakdSide side = {view.dtype, lies_by_planes(shape), shape.channels, view.data, nullptr, false};
  STD_TORCH_CHECK(side.planes || lies_by_positions(shape), name, " must be dense, planes or channels last");
  if (needed) {
    TensorView like = view;
    like.dtype = DType::kFloat;
    grads.push_back(empty_like(x, like));
    side.grad = static_cast<float*>(grads.back().mutable_data_ptr());
    const int64_t run = side.planes ? shape.positions : shape.channels;
    const int64_t bytes =
        shape.batch * shape.channels * shape.positions * static_cast<int64_t>(sizeof(float));
    side.streaming = reinterpret_cast<uintptr_t>(side.grad) % 64 == 0 && run % kSakdAlign == 0 &&
                     streams_past_caches(bytes);
  }
  return side;
}

std::tuple<Tensor, std::vector<Tensor>> sakd_loss(std::vector<Tensor> students, std::vector<Tensor> teachers,
                                                  std::vector<double> factors, bool need_s, bool need_t) {
  STD_TORCH_CHECK(teachers.size() == students.size() && factors.size() == students.size(),
                  "student, teacher and factors must be as many");
  std::vector<Tensor> grads, others;
  double loss = 0;
  for (size_t i = 0; i < students.size(); ++i) {
    const TensorView s_view = view_of(students[i], "student"), t_view = view_of(teachers[i], "teacher");
    const Feature s = feature_of(s_view, "student"), t = feature_of(t_view, "teacher");
    check_same(s, t, "student and teacher");
    STD_TORCH_CHECK(s_view.dim == 4 && s.size[1] == s.size[2], "student must be (N, C, H, H)");
    std::vector<double> sums(static_cast<size_t>(s.batch));
    const SakdArgs args = {s.size[1], side_of(students[i], s_view, s, "student", need_s, grads),
                           side_of(teachers[i], t_view, t, "teacher", need_t, others),
                           static_cast<float>(2 * factors[i]), sums.data()};
    const auto run = kernels().sakd.samples;
    parallel_units(s.batch, (s.channels + t.channels) * s.positions, sakd_scratch(args.side),
                   [&](int64_t begin, int64_t end, void* scratch) { run(args, begin, end, scratch); });
    double total = 0;
    for (double part : sums) total += part;
    loss += factors[i] * total;
  }
  for (Tensor& grad : others) grads.push_back(std::move(grad));
  Tensor value = empty(nullptr, 0, DType::kFloat);
  *static_cast<float*>(value.mutable_data_ptr()) = static_cast<float>(loss);
  return {std::move(value), std::move(grads)};
}

}  // namespace
}  // namespace fastkd

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) { m.impl("sakd_loss", FASTKD_BOX(fastkd::sakd_loss)); }
