// fsp_matrix and fsp_loss with their backward operators, on a GPU: checks and allocation. The division into
// launches is in plan.cu, the arithmetic in forward.cuh and backward.cuh.
//
// Forward, one launch: a block makes a tile of a pair's dloss/dG of one sample: of G_s - G_t = (A_s - A_t)
// B_s^T + A_t (B_s - B_t)^T where student and teacher have equal sizes after pooling, so that what they share
// is subtracted before it is multiplied and rounded; of both products where they have not. Backward, one
// launch: dA = upstream M B / S and dB = upstream M^T A / S, both terms of a middle stage at once. Pooling is
// done where a feature is read, or by a launch before; the gradient of averaging where the other factor is
// read, or, like that of maxima, by windows from a gradient that a launch before has made (gradient.cu).
#include <numeric>
#include <tuple>

#include "cuda/fsp/gradient.cuh"

namespace fastkd {
namespace {

std::vector<TensorView> views_of(const std::vector<Tensor>& tensors, const char* name) {
  std::vector<TensorView> views;
  for (const Tensor& tensor : tensors) views.push_back(view_of(tensor, name));
  return views;
}

DType accumulation_of(const std::vector<TensorView>& views) {
  DType all = DType::kFloat;
  for (const TensorView& view : views) all = accumulation(all, view.dtype);
  return all;
}

std::vector<Feature> features_of(const FspCall& call, const std::vector<TensorView>& views,
                                 const char* name) {
  std::vector<Feature> features;
  for (const TensorView& view : views) {
    features.push_back(feature_of(view, name));
    call.check_feature(view, name);
  }
  return features;
}

// The operands of one chain's pair: side 0 a student's (or the only one's), side 1 a teacher's.
void plan_chain(FspCall& call, PairArguments& pair, int side, const Feature& a, const Feature& b) {
  int64_t size[3];
  common_size(a, b, size);
  pair.operand[2 * side] = call.operand(a, size, b.channels);
  pair.operand[2 * side + 1] = call.operand(b, size, a.channels);
}

bool same_positions(const PairArguments& pair) {
  return std::equal(pair.operand[0].grid, pair.operand[0].grid + 3, pair.operand[2].grid);
}

}  // namespace

Tensor fsp_matrix(const Tensor& a, const Tensor& b, int64_t bits) {
  const FspOptions options = fsp_options(bits);
  const std::vector<TensorView> views = {view_of(a, "a"), view_of(b, "b")};
  const DType accumulate = accumulation_of(views);
  FspCall call(views[0], accumulate, mode_of(views, accumulate, options.precision), options.max);
  const Feature fa = features_of(call, {views[0]}, "a")[0], fb = features_of(call, {views[1]}, "b")[0];
  const int64_t sizes[3] = {fa.batch, fa.channels, fb.channels};
  Tensor out = call.device.empty(sizes, 3, accumulate);
  PairArguments pair{};
  pair.chains = 1;
  pair.out = out.mutable_data_ptr();
  plan_chain(call, pair, 0, fa, fb);
  run_forward(call, {pair}, fa.batch, FspResult::kMatrix, nullptr);
  return out;
}

std::vector<Tensor> fsp_matrix_backward(const Tensor& grad, const Tensor& a, const Tensor& b, int64_t bits) {
  const FspOptions options = fsp_options(bits);
  const std::vector<TensorView> views = {view_of(a, "a"), view_of(b, "b")};
  const TensorView m = view_of(grad, "grad");
  const DType accumulate = accumulation(accumulation_of(views), m.dtype);
  FspCall call(views[0], accumulate, mode_of(views, accumulate, options.precision), options.max);
  const Feature fa = features_of(call, {views[0]}, "a")[0], fb = features_of(call, {views[1]}, "b")[0];
  check_matrix_grad(call, m, fa, fb, "grad");
  FspGradients gradients(call);
  if (options.a_grad) gradients.add(a, views[0], fa, {{fb, m, 1}});
  if (options.b_grad) gradients.add(b, views[1], fb, {{fa, m, 2}});
  return gradients.run(1.0, nullptr);
}

namespace {

// The gradients of stages of a chain from those of its matrices.
std::vector<Tensor> chain_gradients(const std::vector<Tensor>& features, const std::vector<TensorView>& views,
                                    const std::vector<Tensor>& matrix_grads,
                                    const std::vector<int64_t>& stages, const FspOptions& options,
                                    double factor, const TensorView* upstream) {
  if (stages.empty()) return {};
  const std::vector<TensorView> m = views_of(matrix_grads, "matrix_grads");
  const DType accumulate = accumulation(accumulation_of(views), accumulation_of(m));
  FspCall call(views[0], accumulate, mode_of(views, accumulate, options.precision), options.max);
  const std::vector<Feature> f = features_of(call, views, "features");
  for (size_t p = 0; p < m.size(); ++p) check_matrix_grad(call, m[p], f[p], f[p + 1], "matrix_grads");
  FspGradients gradients(call);
  for (const int64_t i : stages) {
    STD_TORCH_CHECK(i >= 0 && i < static_cast<int64_t>(f.size()), "stages must be indices of features, got ",
                    i);
    std::vector<FspTerm> terms;
    if (i > 0) terms.push_back({f[i - 1], m[i - 1], 2});
    if (i < static_cast<int64_t>(m.size())) terms.push_back({f[i + 1], m[i], 1});
    gradients.add(features[i], views[i], f[i], terms);
  }
  return gradients.run(factor, upstream);
}

}  // namespace

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> fsp_loss(const std::vector<Tensor>& student,
                                                                      const std::vector<Tensor>& teacher,
                                                                      int64_t bits,
                                                                      const std::vector<double>& numbers) {
  const FspOptions options = fsp_options(bits);
  STD_TORCH_CHECK(student.size() >= 2, "student must hold at least two stages, got ", student.size());
  STD_TORCH_CHECK(teacher.size() == student.size(), "student and teacher must hold equally many stages, got ",
                  student.size(), " and ", teacher.size());
  const size_t count = student.size() - 1;
  const FspNumbers given = fsp_numbers(numbers, count);
  STD_TORCH_CHECK(options.with_grad || !options.prepare, "prepare wants with_grad");

  const std::vector<TensorView> s_views = views_of(student, "student"),
                                t_views = views_of(teacher, "teacher");
  std::vector<TensorView> all = s_views;
  all.insert(all.end(), t_views.begin(), t_views.end());
  const DType accumulate = accumulation_of(all);
  FspCall call(all[0], accumulate, mode_of(all, accumulate, options.precision), options.max);
  const std::vector<Feature> s = features_of(call, s_views, "student"),
                             t = features_of(call, t_views, "teacher");
  for (size_t i = 0; i <= count; ++i) {
    STD_TORCH_CHECK(s[i].channels == t[i].channels, "student and teacher must have equal channels, got ",
                    s[i].channels, " and ", t[i].channels, " in stage ", i);
  }
  std::vector<PairArguments> pairs;
  std::vector<Tensor> grads;
  for (size_t p = 0; p < count; ++p) {
    const int64_t sizes[3] = {s[p].batch, s[p].channels, s[p + 1].channels};
    PairArguments pair{};
    pair.chains = 2;
    const bool mean = options.distance == FspDistance::kSquared;
    pair.factor = pair_factor(options, given, p, count) /
                  static_cast<double>(mean ? sizes[0] * sizes[1] * sizes[2] : sizes[0]);
    plan_chain(call, pair, 0, s[p], s[p + 1]);
    plan_chain(call, pair, 1, t[p], t[p + 1]);
    pair.difference = same_positions(pair);
    if (options.with_grad) {
      grads.push_back(call.device.empty(sizes, 3, accumulate));
      pair.out = grads.back().mutable_data_ptr();
    }
    pairs.push_back(pair);
  }
  Tensor loss = call.device.empty(nullptr, 0, accumulate);
  const bool columns = options.distance == FspDistance::kColumnL2;
  run_forward(call, pairs, s[0].batch, columns ? FspResult::kColumnNorms : FspResult::kSquares,
              loss.mutable_data_ptr());
  std::vector<Tensor> gradients;
  if (options.prepare) {
    std::vector<int64_t> stages(count + 1);
    std::iota(stages.begin(), stages.end(), 0);
    gradients = chain_gradients(student, s_views, grads, stages, options, given.upstream, nullptr);
  }
  return {std::move(loss), std::move(grads), std::move(gradients)};
}

std::vector<Tensor> fsp_loss_backward(const Tensor& grad, const std::vector<Tensor>& features,
                                      const std::vector<Tensor>& matrix_grads, int64_t bits,
                                      const std::vector<int64_t>& stages, const std::vector<Tensor>& others) {
  const FspOptions options = fsp_options(bits);
  STD_TORCH_CHECK(others.empty(),
                  "others is for matrices that were not saved, and the CUDA library saves all");
  STD_TORCH_CHECK(features.size() >= 2 && matrix_grads.size() == features.size() - 1,
                  "matrix_grads must hold one matrix a pair of features");
  const std::vector<TensorView> views = views_of(features, "features");
  const TensorView upstream = view_of(grad, "grad");
  check_device(upstream, views[0], "grad");
  for (int d = 0; d < upstream.dim; ++d) STD_TORCH_CHECK(upstream.sizes[d] == 1, "grad must hold one number");
  return chain_gradients(features, views, matrix_grads, stages, options, options.negate ? -1.0 : 1.0,
                         &upstream);
}

}  // namespace fastkd

STABLE_TORCH_LIBRARY_IMPL(fastkd_cuda, FASTKD_DISPATCH_KEY, m) {
  m.impl("fsp_matrix", FASTKD_BOX(fastkd::fsp_matrix));
  m.impl("fsp_matrix_backward", FASTKD_BOX(fastkd::fsp_matrix_backward));
  m.impl("fsp_loss", FASTKD_BOX(fastkd::fsp_loss));
  m.impl("fsp_loss_backward", FASTKD_BOX(fastkd::fsp_loss_backward));
}
