// fsp_matrix and fsp_loss with their backward operators: checks and allocation. The division into units of
// work is in plan.cpp, the arithmetic in fsp.inl.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <tuple>

#include "common/fsp_options.h"
#include "cpu/fsp/plan.h"

namespace fastkd {
namespace {

std::vector<Feature> features_of(const std::vector<Tensor>& tensors, const char* name) {
  std::vector<Feature> features;
  features.reserve(tensors.size());
  for (const Tensor& tensor : tensors) features.push_back(feature_of(view_of(tensor, name), name));
  return features;
}

DType accumulation_of(const std::vector<Feature>& features, DType least) {
  for (const Feature& feature : features) least = accumulation(least, feature.dtype);
  return least;
}

// All maps of a call: one batch size, one number of spatial dimensions (leading ones of size 1 cannot tell,
// so the tensors are asked).
void check_alike(const Tensor& first, const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == first.dim(), name,
                  ": all maps must have the same number of dimensions, got ", tensor.dim(), " and ",
                  first.dim());
  STD_TORCH_CHECK(tensor.size(0) == first.size(0), name, ": all maps must have the same batch size, got ",
                  tensor.size(0), " and ", first.size(0));
}

void check_matrix_grad(const TensorView& m, int64_t batch, int64_t rows, int64_t columns, const char* name) {
  STD_TORCH_CHECK(m.dtype == DType::kFloat || m.dtype == DType::kDouble, name, " must be float32 or float64");
  STD_TORCH_CHECK(m.dim == 3 && m.sizes[0] == batch && m.sizes[1] == rows && m.sizes[2] == columns, name,
                  " must have shape (", batch, ", ", rows, ", ", columns, ")");
}

// float8 and the like never get here: view_of() refuses what is not one of the four dtypes.
template <class T>
void write_scalar(const Tensor& to, double value) {
  const T rounded = T(value);
  std::memcpy(to.data_ptr(), &rounded, sizeof rounded);
}

}  // namespace

Tensor fsp_matrix(const Tensor& a, const Tensor& b, int64_t bits) {
  const FspOptions options = fsp_options(bits);
  const Feature chain[2] = {feature_of(view_of(a, "a"), "a"), feature_of(view_of(b, "b"), "b")};
  check_alike(a, b, "b");
  const DType accumulate = accumulation(chain[0].dtype, chain[1].dtype);
  const int64_t sizes[3] = {chain[0].batch, chain[0].channels, chain[1].channels};
  Tensor out = empty(sizes, 3, accumulate);
  Pools pools;
  std::vector<FspPair> pairs{plan_pair(chain, nullptr, options.max, FspResult::kMatrix, false, pools)};
  pairs[0].out = out.data_ptr();
  run_forward(ForwardPlan(pairs, sizes[0]), accumulate);
  return out;
}

std::vector<Tensor> fsp_matrix_backward(const Tensor& grad, const Tensor& a, const Tensor& b, int64_t bits) {
  const FspOptions options = fsp_options(bits);
  const Feature fa = feature_of(view_of(a, "a"), "a"), fb = feature_of(view_of(b, "b"), "b");
  check_alike(a, b, "b");
  const TensorView m = view_of(grad, "grad");
  check_matrix_grad(m, fa.batch, fa.channels, fb.channels, "grad");
  const DType accumulate = accumulation(accumulation(fa.dtype, fb.dtype), m.dtype);
  Pools pools;
  FspOperand as_a, as_b;
  const int64_t positions = join(fa, fb, options.max, pools, as_a, as_b);
  std::vector<FspStage> stages;
  std::vector<Tensor> out;
  for (int side = 0; side < 2; ++side) {
    if (!(side == 0 ? options.a_grad : options.b_grad)) continue;
    FspStage stage{};
    stage.terms = 1;
    stage.term[0] = plan_term(side == 0 ? as_b : as_a, (side == 0 ? as_a : as_b).pool, positions, 1.0, m,
                              side == 0 ? 1 : 2);
    out.push_back(plan_stage(stage, side == 0 ? a : b, accumulate));
    stages.push_back(stage);
  }
  run_backward(BackwardPlan(stages), accumulate);
  return out;
}

// The gradients of a chain's stages, planned from those of its FSP matrices and allocated.
struct ChainGradients {
  std::vector<FspStage> plans;
  std::vector<Tensor> out;
  Pools pools;
};

// A term of the student's feature at `side` of a pair (0: the left factor) from saved squares; `teacher`: the
// teacher's feature there.
void take_squares(FspTerm& term, const FspOperand& own, const Feature& teacher, const TensorView& m,
                  int side) {
  term.low_rank = 1;
  term.right = side;
  term.own_chains[0] = own;
  term.own_chains[1] = {teacher, own.pool};
  term.m_n = m.strides[0];
}

// Squares as the forward pass saves them, of the pair's common positions.
void check_squares(const TensorView& m, int64_t batch, int64_t positions, DType accumulate) {
  STD_TORCH_CHECK(m.dtype == accumulate && m.dim == 4 && m.sizes[0] == batch &&
                      m.sizes[1] == kLowRankSquares && m.sizes[2] == positions && m.sizes[3] == positions &&
                      m.strides[3] == 1 && m.strides[2] == positions && m.strides[1] == positions * positions,
                  "matrix_grads must hold a contiguous tensor of shape (", batch, ", ", kLowRankSquares, ", ",
                  positions, ", ", positions, ") here, as the forward pass saved it");
}

// `other`: the features of the other chain, the teacher's, as far as pairs have squares.
void plan_chain(ChainGradients& chain, const std::vector<Tensor>& features, const std::vector<Feature>& f,
                const std::vector<Feature>& other, const std::vector<Tensor>& matrix_grads,
                const std::vector<int64_t>& stages, double upstream, bool max, DType accumulate) {
  std::vector<TensorView> m;
  std::vector<FspOperand> as_a(matrix_grads.size()), as_b(matrix_grads.size());
  std::vector<int64_t> positions;
  m.reserve(matrix_grads.size());
  positions.reserve(matrix_grads.size());
  chain.out.reserve(stages.size());
  chain.plans.reserve(stages.size());
  for (size_t p = 0; p < matrix_grads.size(); ++p) {
    check_alike(features[0], features[p + 1], "features");
    m.push_back(view_of(matrix_grads[p], "matrix_grads"));
    positions.push_back(join(f[p], f[p + 1], max, chain.pools, as_a[p], as_b[p]));
    if (m[p].dim == 4) {
      check_squares(m[p], f[p].batch, positions[p], accumulate);
    } else {
      check_matrix_grad(m[p], f[p].batch, f[p].channels, f[p + 1].channels, "matrix_grads");
    }
  }
  for (int64_t i : stages) {
    STD_TORCH_CHECK(i >= 0 && i < int64_t(f.size()), "stages must be indices of features, got ", i);
    FspStage plan{};
    for (int side = 1; side >= 0; --side) {
      const int64_t p = i - side;
      if (p < 0 || p >= int64_t(m.size())) continue;
      const FspOperand& own = (side ? as_b : as_a)[p];
      FspTerm& term = plan.term[plan.terms++];
      term = plan_term((side ? as_a : as_b)[p], own.pool, positions[p], upstream, m[p], side ? 2 : 1);
      if (m[p].dim == 4) take_squares(term, own, other[i], m[p], side);
    }
    chain.out.push_back(plan_stage(plan, features[i], accumulate));
    chain.plans.push_back(plan);
  }
}

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
  const std::vector<Feature> s = features_of(student, "student"), t = features_of(teacher, "teacher");
  for (size_t i = 0; i <= count; ++i) {
    check_alike(student[0], student[i], "student");
    check_alike(student[0], teacher[i], "teacher");
    STD_TORCH_CHECK(s[i].channels == t[i].channels, "student and teacher must have equal channels, got ",
                    s[i].channels, " and ", t[i].channels, " in stage ", i);
  }
  const DType accumulate = accumulation_of(t, accumulation_of(s, DType::kFloat));
  Pools pools;
  std::vector<FspPair> pairs;
  std::vector<Tensor> grads;
  std::vector<double> factors;
  pairs.reserve(count);
  grads.reserve(count);
  factors.reserve(count);
  const bool columns = options.distance == FspDistance::kColumnL2;
  for (size_t p = 0; p < count; ++p) {
    const int64_t sizes[3] = {s[p].batch, s[p].channels, s[p + 1].channels};
    const double products =
        options.distance == FspDistance::kSquared ? double(sizes[1]) * double(sizes[2]) : 1.0;
    factors.push_back(pair_factor(options, given, p, count) / double(sizes[0]) / products);
    pairs.push_back(plan_pair(&s[p], &t[p], options.max,
                              columns ? FspResult::kColumnNorms : FspResult::kSquares, !options.teacher_grad,
                              pools));
    pairs.back().slope = columns ? factors.back() : 2.0 * factors.back();
    if (!options.with_grad) continue;
    const int64_t k = pairs.back().positions[0], squares[4] = {sizes[0], kLowRankSquares, k, k};
    grads.push_back(pairs.back().low_rank ? empty(squares, 4, accumulate) : empty(sizes, 3, accumulate));
    pairs.back().out = grads.back().data_ptr();
  }
  STD_TORCH_CHECK(options.with_grad || !options.prepare, "prepare wants with_grad");
  ChainGradients gradients;
  if (options.prepare) {
    std::vector<int64_t> stages(count + 1);
    std::iota(stages.begin(), stages.end(), 0);
    plan_chain(gradients, student, s, t, grads, stages, given.upstream, options.max, accumulate);
  }
  const ForwardPlan forward(pairs, s[0].batch);
  run_training(forward, BackwardPlan(gradients.plans), accumulate);
  const std::vector<double> losses = forward.losses();
  double loss = 0.0;
  for (size_t p = 0; p < count; ++p) loss += factors[p] * losses[p];
  Tensor out = empty(nullptr, 0, accumulate);
  accumulate == DType::kDouble ? write_scalar<double>(out, loss) : write_scalar<float>(out, loss);
  return {std::move(out), std::move(grads), std::move(gradients.out)};
}

std::vector<Tensor> fsp_loss_backward(const Tensor& grad, const std::vector<Tensor>& features,
                                      const std::vector<Tensor>& matrix_grads, int64_t bits,
                                      const std::vector<int64_t>& stages, const std::vector<Tensor>& others) {
  const FspOptions options = fsp_options(bits);
  STD_TORCH_CHECK(features.size() >= 2 && matrix_grads.size() == features.size() - 1,
                  "matrix_grads must hold one matrix a pair of features");
  const double upstream = options.negate ? -scalar_of(grad, "grad") : scalar_of(grad, "grad");
  const std::vector<Feature> f = features_of(features, "features");
  DType accumulate = accumulation_of(f, DType::kFloat);
  for (const Tensor& m : matrix_grads)
    accumulate = accumulation(accumulate, view_of(m, "matrix_grads").dtype);
  // the other chain's features of the pairs whose matrices were not saved
  const std::vector<Feature> given = features_of(others, "others");
  STD_TORCH_CHECK(!options.negate || given.empty(),
                  "others must be empty for the teacher's gradients, which want a loss with teacher_grad");
  std::vector<Feature> other(f.size());
  size_t used = 0;
  for (size_t i = 0; i < f.size(); ++i) {
    if (!(i > 0 && matrix_grads[i - 1].dim() == 4) &&
        !(i < matrix_grads.size() && matrix_grads[i].dim() == 4))
      continue;
    STD_TORCH_CHECK(used < given.size(), "others must hold the other chain's feature of stage ", i,
                    ", whose matrix was not saved");
    other[i] = given[used++];
    STD_TORCH_CHECK(other[i].batch == f[i].batch && other[i].channels == f[i].channels &&
                        std::equal(f[i].size, f[i].size + 3, other[i].size),
                    "others must have the shapes of features, and differs in stage ", i);
    accumulate = accumulation(accumulate, other[i].dtype);
  }
  STD_TORCH_CHECK(used == given.size(),
                  "others must hold the features of pairs whose matrices were not saved: ", used, ", got ",
                  given.size());
  ChainGradients gradients;
  plan_chain(gradients, features, f, other, matrix_grads, stages, upstream, options.max, accumulate);
  run_backward(BackwardPlan(gradients.plans), accumulate);
  return std::move(gradients.out);
}

}  // namespace fastkd

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("fsp_matrix", TORCH_BOX(&fastkd::fsp_matrix));
  m.impl("fsp_matrix_backward", TORCH_BOX(&fastkd::fsp_matrix_backward));
  m.impl("fsp_loss", TORCH_BOX(&fastkd::fsp_loss));
  m.impl("fsp_loss_backward", TORCH_BOX(&fastkd::fsp_loss_backward));
}
