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

using Features = Few<Feature>;

// What the maps of a call have in common: one batch size, one number of dimensions (of which a Feature's
// leading ones of size 1 cannot tell). And the dtype that holds the numbers of all.
struct Common {
  DType accumulate = DType::kFloat;
  int64_t batch = 0, dim = 0;

  Feature feature(const Tensor& tensor, const char* name) {
    const TensorView view = view_of(tensor, name);
    const Feature feature = feature_of(view, name);
    if (dim == 0) batch = feature.batch, dim = view.dim;
    STD_TORCH_CHECK(view.dim == dim, name, ": all maps must have the same number of dimensions, got ",
                    view.dim, " and ", dim);
    STD_TORCH_CHECK(feature.batch == batch, name, ": all maps must have the same batch size, got ",
                    feature.batch, " and ", batch);
    accumulate = accumulation(accumulate, view.dtype);
    return feature;
  }
  void features(const Tensors& tensors, const char* name, Features& to) {
    for (size_t i = 0; i < tensors.size(); ++i) to[i] = feature(tensors[i], name);
  }
};

void check_matrix_grad(const TensorView& m, int64_t batch, int64_t rows, int64_t columns, const char* name) {
  STD_TORCH_CHECK(m.dtype == DType::kFloat || m.dtype == DType::kDouble, name, " must be float32 or float64");
  STD_TORCH_CHECK(m.dim == 3 && m.sizes[0] == batch && m.sizes[1] == rows && m.sizes[2] == columns, name,
                  " must have shape (", batch, ", ", rows, ", ", columns, ")");
}

// float8 and the like never get here: view_of() refuses what is not one of the four dtypes.
template <class T>
void write_scalar(const Tensor& to, double value) {
  const T rounded = T(value);
  std::memcpy(to.mutable_data_ptr(), &rounded, sizeof rounded);
}

}  // namespace

Tensor fsp_matrix(const Tensor& a, const Tensor& b, int64_t bits) {
  const FspOptions options = fsp_options(bits);
  Common common;
  const Feature chain[2] = {common.feature(a, "a"), common.feature(b, "b")};
  const int64_t sizes[3] = {common.batch, chain[0].channels, chain[1].channels};
  Tensor out = empty(sizes, 3, common.accumulate);
  Pools pools;
  Few<FspPair> pairs(1);
  pairs[0] = plan_pair(chain, nullptr, options.max, FspResult::kMatrix, false, pools);
  pairs[0].out = out.mutable_data_ptr();
  run_forward(ForwardPlan(pairs, common.batch), common.accumulate);
  return out;
}

Tensors fsp_matrix_backward(const Tensor& grad, const Tensor& a, const Tensor& b, int64_t bits) {
  const FspOptions options = fsp_options(bits);
  Common common;
  const Feature fa = common.feature(a, "a"), fb = common.feature(b, "b");
  const TensorView m = view_of(grad, "grad");
  check_matrix_grad(m, fa.batch, fa.channels, fb.channels, "grad");
  const DType accumulate = accumulation(common.accumulate, m.dtype);
  Pools pools;
  FspOperand as_a, as_b;
  const int64_t positions = join(fa, fb, options.max, pools, as_a, as_b);
  Few<FspStage> stages((options.a_grad ? 1 : 0) + (options.b_grad ? 1 : 0));
  Tensors out;
  for (int side = 0; side < 2; ++side) {
    if (!(side == 0 ? options.a_grad : options.b_grad)) continue;
    FspStage& stage = stages[out.size()];
    stage = {};
    stage.terms = 1;
    stage.term[0] = plan_term(side == 0 ? as_b : as_a, (side == 0 ? as_a : as_b).pool, positions, 1.0, m,
                              side == 0 ? 1 : 2);
    out.push_back(plan_stage(stage, side == 0 ? a : b, accumulate));
  }
  run_backward(BackwardPlan(stages), accumulate);
  return out;
}

// The gradients of a chain's stages, planned from those of its FSP matrices and allocated.
struct ChainGradients {
  Few<FspStage> plans;
  Tensors out;
  Pools pools;

  explicit ChainGradients(size_t stages) : plans(stages) { out.reserve(stages); }
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

// `m`: dloss/dG of each pair, or squares; `other`: the features of the other chain, the teacher's, as far as
// pairs have squares.
void plan_chain(ChainGradients& chain, const Tensors& features, const Features& f, const Features& other,
                const Few<TensorView>& m, const std::vector<int64_t>& stages, double upstream, bool max,
                DType accumulate) {
  Few<FspOperand> as_a(m.size()), as_b(m.size());
  Few<int64_t> positions(m.size());
  for (size_t p = 0; p < m.size(); ++p) {
    positions[p] = join(f[p], f[p + 1], max, chain.pools, as_a[p], as_b[p]);
    if (m[p].dim == 4) {
      check_squares(m[p], f[p].batch, positions[p], accumulate);
    } else {
      check_matrix_grad(m[p], f[p].batch, f[p].channels, f[p + 1].channels, "matrix_grads");
    }
  }
  for (int64_t i : stages) {
    STD_TORCH_CHECK(i >= 0 && i < int64_t(f.size()), "stages must be indices of features, got ", i);
    FspStage& plan = chain.plans[chain.out.size()];
    plan = {};
    for (int side = 1; side >= 0; --side) {
      const int64_t p = i - side;
      if (p < 0 || p >= int64_t(m.size())) continue;
      const FspOperand& own = (side ? as_b : as_a)[p];
      FspTerm& term = plan.term[plan.terms++];
      term = plan_term((side ? as_a : as_b)[p], own.pool, positions[p], upstream, m[p], side ? 2 : 1);
      if (m[p].dim == 4) take_squares(term, own, other[i], m[p], side);
    }
    chain.out.push_back(plan_stage(plan, features[i], accumulate));
  }
}

// What a forward pass saves of each pair, allocated: dloss/dG, or squares. Beside prepared gradients, where
// the backward pass hardly ever reads them, matrices come in one tensor, pair by pair: of several, each costs
// the host more than its arithmetic.
Tensors save_pairs(Few<FspPair>& pairs, Few<TensorView>& m, int64_t batch, bool prepare, DType accumulate) {
  int64_t total = 0;
  bool joined = prepare;  // fastkd/ops/fsp.py has the same rule
  for (size_t p = 0; p < pairs.size(); ++p) {
    const FspPair& pair = pairs[p];
    const int64_t k = pair.positions[0], rows = pair.a[0].x.channels, columns = pair.b[0].x.channels;
    m[p] = pair.low_rank ? TensorView{nullptr, accumulate, 0, 4, {batch, kLowRankSquares, k, k}, {}}
                         : TensorView{nullptr, accumulate, 0, 3, {batch, rows, columns}, {}};
    int64_t numbers = 1;
    for (int32_t d = m[p].dim - 1; d >= 0; --d) {
      m[p].strides[d] = numbers;
      numbers *= m[p].sizes[d];
    }
    total += numbers;
    joined = joined && !pair.low_rank;
  }
  Tensors out;
  out.reserve(joined ? 1 : pairs.size());
  if (joined) out.push_back(empty(&total, 1, accumulate));
  char* next = joined ? static_cast<char*>(out[0].mutable_data_ptr()) : nullptr;
  for (size_t p = 0; p < pairs.size(); ++p) {
    if (joined) {
      m[p].data = next;
      next += batch * m[p].strides[0] * size_of(accumulate);
    } else {
      out.push_back(empty(m[p].sizes, m[p].dim, accumulate));
      m[p].data = out[p].mutable_data_ptr();
    }
    pairs[p].out = m[p].data;
  }
  return out;
}

std::tuple<Tensor, Tensors, Tensors> fsp_loss(const Tensors& student, const Tensors& teacher, int64_t bits,
                                              const std::vector<double>& numbers) {
  const FspOptions options = fsp_options(bits);
  STD_TORCH_CHECK(student.size() >= 2, "student must hold at least two stages, got ", student.size());
  STD_TORCH_CHECK(teacher.size() == student.size(), "student and teacher must hold equally many stages, got ",
                  student.size(), " and ", teacher.size());
  STD_TORCH_CHECK(options.with_grad || !options.prepare, "prepare wants with_grad");
  const size_t count = student.size() - 1;
  const FspNumbers given = fsp_numbers(numbers, count);
  Common common;
  Features s(count + 1), t(count + 1);
  common.features(student, "student", s);
  common.features(teacher, "teacher", t);
  for (size_t i = 0; i <= count; ++i) {
    STD_TORCH_CHECK(s[i].channels == t[i].channels, "student and teacher must have equal channels, got ",
                    s[i].channels, " and ", t[i].channels, " in stage ", i);
  }
  Pools pools;
  Few<FspPair> pairs(count);
  Few<double> factors(count);
  const bool columns = options.distance == FspDistance::kColumnL2;
  for (size_t p = 0; p < count; ++p) {
    const double products =
        options.distance == FspDistance::kSquared ? double(s[p].channels) * double(s[p + 1].channels) : 1.0;
    factors[p] = pair_factor(options, given, p, count) / double(common.batch) / products;
    pairs[p] = plan_pair(&s[p], &t[p], options.max, columns ? FspResult::kColumnNorms : FspResult::kSquares,
                         !options.teacher_grad, pools);
    pairs[p].slope = columns ? factors[p] : 2.0 * factors[p];
  }
  Tensors saved;
  Few<TensorView> m(count);
  if (options.with_grad) saved = save_pairs(pairs, m, common.batch, options.prepare, common.accumulate);
  ChainGradients gradients(options.prepare ? count + 1 : 0);
  if (options.prepare) {
    std::vector<int64_t> stages(count + 1);
    std::iota(stages.begin(), stages.end(), 0);
    plan_chain(gradients, student, s, t, m, stages, given.upstream, options.max, common.accumulate);
  }
  const ForwardPlan forward(pairs, common.batch);
  run_training(forward, BackwardPlan(gradients.plans), common.accumulate);
  const std::vector<double> losses = forward.losses();
  double loss = 0.0;
  for (size_t p = 0; p < count; ++p) loss += factors[p] * losses[p];
  Tensor out = empty(nullptr, 0, common.accumulate);
  common.accumulate == DType::kDouble ? write_scalar<double>(out, loss) : write_scalar<float>(out, loss);
  return {std::move(out), std::move(saved), std::move(gradients.out)};
}

Tensors fsp_loss_backward(const Tensor& grad, const Tensors& features, const Tensors& matrix_grads,
                          int64_t bits, const std::vector<int64_t>& stages, const Tensors& others) {
  const FspOptions options = fsp_options(bits);
  STD_TORCH_CHECK(features.size() >= 2 && matrix_grads.size() == features.size() - 1,
                  "matrix_grads must hold one matrix a pair of features");
  const double upstream = options.negate ? -scalar_of(grad, "grad") : scalar_of(grad, "grad");
  Common common;
  Features f(features.size()), other(features.size());
  common.features(features, "features", f);
  DType accumulate = common.accumulate;
  Few<TensorView> m(matrix_grads.size());
  for (size_t p = 0; p < m.size(); ++p) {
    m[p] = view_of(matrix_grads[p], "matrix_grads");
    accumulate = accumulation(accumulate, m[p].dtype);
  }
  // the other chain's features of the pairs whose matrices were not saved
  STD_TORCH_CHECK(!options.negate || others.empty(),
                  "others must be empty for the teacher's gradients, which want a loss with teacher_grad");
  size_t used = 0;
  for (size_t i = 0; i < f.size(); ++i) {
    if (!(i > 0 && m[i - 1].dim == 4) && !(i < m.size() && m[i].dim == 4)) continue;
    STD_TORCH_CHECK(used < others.size(), "others must hold the other chain's feature of stage ", i,
                    ", whose matrix was not saved");
    other[i] = feature_of(view_of(others[used++], "others"), "others");
    STD_TORCH_CHECK(other[i].batch == f[i].batch && other[i].channels == f[i].channels &&
                        std::equal(f[i].size, f[i].size + 3, other[i].size),
                    "others must have the shapes of features, and differs in stage ", i);
    accumulate = accumulation(accumulate, other[i].dtype);
  }
  STD_TORCH_CHECK(used == others.size(),
                  "others must hold the features of pairs whose matrices were not saved: ", used, ", got ",
                  others.size());
  ChainGradients gradients(stages.size());
  plan_chain(gradients, features, f, other, m, stages, upstream, options.max, accumulate);
  run_backward(BackwardPlan(gradients.plans), accumulate);
  return std::move(gradients.out);
}

}  // namespace fastkd

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("fsp_matrix", FASTKD_BOX(fastkd::fsp_matrix));
  m.impl("fsp_matrix_backward", FASTKD_BOX(fastkd::fsp_matrix_backward));
  m.impl("fsp_loss", FASTKD_BOX(fastkd::fsp_loss));
  m.impl("fsp_loss_backward", FASTKD_BOX(fastkd::fsp_loss_backward));
}
