// fsp_matrix and fsp_loss with their backward operators: checks, allocation and the division into units of work. The arithmetic is in
// gram.inl.
#include "dispatch.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>

namespace fastkd {
namespace {

void check_precision(const std::optional<Text>& precision) {
  STD_TORCH_CHECK(!precision || precision->value == "ieee" || precision->value == "tf32" || precision->value == "tf32x3",
                  "precision must be \"ieee\", \"tf32\", \"tf32x3\" or None, got \"", precision->value, "\"");
}

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

// Products this deep are summed in registers: gemm.inl has the same number.
constexpr int64_t kGemmDepth = 256;

// A gradient this large is written past the caches: it would not stay there until somebody reads it.
constexpr int64_t kStreamedBytes = 1 << 20;

int index_of(DType accumulate) { return accumulate == DType::kDouble ? 1 : 0; }

bool same_size(const Feature& a, const Feature& b) { return std::equal(a.size, a.size + 3, b.size); }

// All maps of a call: one batch size, one number of spatial dimensions (leading ones of size 1 cannot tell, so the tensors are asked).
void check_alike(const Tensor& first, const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == first.dim(), name, ": all maps must have the same number of dimensions, got ", tensor.dim(), " and ",
                  first.dim());
  STD_TORCH_CHECK(tensor.size(0) == first.size(0), name, ": all maps must have the same batch size, got ", tensor.size(0), " and ",
                  first.size(0));
}

// Owns the pooling tables that the plans point into.
struct Pools {
  std::vector<PoolTables> tables;
  PoolPlan make(const Feature& x, const int64_t* out, bool max) {
    tables.push_back(make_pool(x.size, out, max));
    return tables.back().plan;
  }
};

// Both maps of a pair as the pair sees them; returns the number of common positions.
int64_t join(const Feature& a, const Feature& b, bool max, Pools& pools, GramOperand& as_a, GramOperand& as_b) {
  int64_t size[3], positions = 1;
  for (int d = 0; d < 3; ++d) positions *= size[d] = std::min(a.size[d], b.size[d]);
  as_a = {a, pools.make(a, size, max)};
  as_b = {b, pools.make(b, size, max)};
  return positions;
}

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Near-equal blocks of at most `most`, in multiples of `unit`.
int64_t block_of(int64_t total, int64_t most, int64_t unit) {
  const int64_t blocks = (total + most - 1) / most;
  return std::min(total, round_up((total + blocks - 1) / blocks, unit));
}

// Whether operand_block() gives planes.
bool is_planes(const GramOperand& operand) {
  return operand.x.layout != Layout::kChannelsLast || (operand.pool.active && operand.pool.max);
}

// Fewer positions than these do not pay for adding up the lanes of a vector for every element of G.
constexpr int64_t kPlanePositions = 64;

GramPair plan_pair(const Feature* student, const Feature* teacher, bool max, GramResult result, Pools& pools) {
  GramPair pair{};
  pair.chains = teacher ? 2 : 1;
  pair.positions[0] = join(student[0], student[1], max, pools, pair.a[0], pair.b[0]);
  if (teacher) {
    pair.positions[1] = join(teacher[0], teacher[1], max, pools, pair.a[1], pair.b[1]);
    pair.fused = same_size(student[0], teacher[0]) && same_size(student[1], teacher[1]);
  }
  pair.result = result;
  // A unit's rows of G stay in the second-level cache (256 KiB of floats) while the products are added up. The norms of columns need all
  // rows.
  const int64_t ca = student[0].channels, cb = student[1].channels;
  pair.rows = result == GramResult::kColumnNorms ? ca : block_of(ca, std::max<int64_t>(64, 65536 / cb), 16);
  pair.row_blocks = (ca + pair.rows - 1) / pair.rows;
  const int64_t positions = std::max(pair.positions[0], pair.positions[1]);
  pair.planes = positions >= kPlanePositions;
  for (int chain = 0; chain < pair.chains; ++chain) pair.planes = pair.planes && is_planes(pair.a[chain]) && is_planes(pair.b[chain]);
  if (pair.planes) {
    pair.depth = block_of(positions, std::max<int64_t>(64, 8192 / (pair.rows + cb)), 16);
    return pair;
  }
  // The packed positions of all operands stay in the first-level cache (32 KiB) if that leaves enough of them for a product to be
  // efficient.
  const int64_t width = pair.chains * (pair.rows + cb);
  pair.depth = block_of(positions, std::min<int64_t>(512, std::max<int64_t>(64, 8192 / width)), 16);
  return pair;
}

// 16 multiply-adds cost about as much as one element of a streaming pass.
constexpr int64_t kWorkPerElement = 16;

// A forward pass, planned; the losses of its units.
struct ForwardPlan {
  GramForward call{};
  int64_t batch, work = 0;  // work: multiply-adds a sample
  std::vector<double> partial;

  ForwardPlan(const std::vector<GramPair>& pairs, int64_t samples) : batch(samples) {
    call.pairs = pairs.data();
    call.count = int64_t(pairs.size());
    for (const GramPair& pair : pairs) {
      call.units_per_sample += pair.row_blocks;
      work += pair.positions[0] * pair.a[0].x.channels * pair.b[0].x.channels * pair.chains;
    }
    partial.resize(batch * call.units_per_sample);
    call.partial = partial.data();
  }
  ForwardPlan(const ForwardPlan&) = delete;

  // The losses of the pairs without their factors (zeros for plain matrices).
  std::vector<double> losses() const {
    std::vector<double> sums(call.count);
    for (int64_t n = 0, unit = 0; n < batch; ++n)
      for (int64_t p = 0; p < call.count; ++p)
        for (int64_t r = 0; r < call.pairs[p].row_blocks; ++r) sums[p] += partial[unit++];
    return sums;
  }
};

void run_forward(const ForwardPlan& plan, DType accumulate) {
  const GramForward& call = plan.call;
  const GramKernels& table = kernels().gram;
  const int which = index_of(accumulate);
  parallel_units(int64_t(plan.partial.size()), plan.work / call.units_per_sample / kWorkPerElement + 1, table.forward_scratch[which](call),
                 [&](int64_t begin, int64_t end, void* scratch) { table.forward[which](call, begin, end, scratch); });
}

GramTerm plan_term(const GramOperand& other, const PoolPlan& own, int64_t positions, double upstream, const TensorView& m,
                   int channel_dim) {
  GramTerm term{};
  term.other = other;
  term.own = own;
  term.m = m.data;
  term.m_dtype = m.dtype;
  term.m_n = m.strides[0];
  term.m_c = m.strides[channel_dim];
  term.m_o = m.strides[3 - channel_dim];
  term.scale = upstream / double(positions);
  term.positions = positions;
  term.depth = block_of(positions, std::max<int64_t>(64, 65536 / other.x.channels), 16);
  return term;
}

// Whether the gradient is written past the caches: it is too large to stay there, and gemm() can (see Gemm::stream).
bool streams(const GramStage& stage) {
  const Feature& x = stage.grad;
  const int64_t size = x.dtype == DType::kDouble ? 8 : 4, line = 64 / size;
  bool can = reinterpret_cast<uintptr_t>(x.data) % 64 == 0 && x.stride_n % line == 0;
  can = can && (stage.channels_last ? x.channels % line == 0 && x.stride_s % line == 0 : x.positions % line == 0 && x.stride_c % line == 0);
  for (int t = 0; t < stage.terms; ++t) can = can && stage.term[t].other.x.channels <= kGemmDepth;
  return can && bytes_of(x) >= kStreamedBytes;
}

// The gradient of one feature, allocated here, with the terms already in `stage`.
Tensor plan_stage(GramStage& stage, const Tensor& x, DType accumulate) {
  const TensorView view = view_of(x, "feature");
  Tensor grad = empty_like(x, view);
  stage.x = feature_of(view, "feature");
  stage.grad = feature_of(view_of(grad, "gradient"), "gradient");
  // Un-pooling a maximum looks its position up in planes.
  bool planes = false;
  for (int t = 0; t < stage.terms; ++t) planes = planes || (stage.term[t].own.active && stage.term[t].own.max);
  stage.channels_last = stage.grad.layout == Layout::kChannelsLast && !planes;
  stage.direct = stage.grad.dtype == accumulate && (stage.channels_last || stage.grad.layout == Layout::kPlanes);
  stage.stream = stage.direct && streams(stage);
  // A block's gradient stays in the second-level cache when it has to be converted or spread out afterwards.
  // Every block pools the other map anew.
  bool pools = false;
  for (int t = 0; t < stage.terms; ++t) pools = pools || stage.term[t].other.pool.active;
  const int64_t most = stage.direct ? (pools ? 512 : 128) : std::max<int64_t>(32, 65536 / stage.grad.positions);
  stage.channels = block_of(stage.grad.channels, most, 16);
  stage.channel_blocks = (stage.grad.channels + stage.channels - 1) / stage.channels;
  return grad;
}

struct BackwardPlan {
  GramBackward call{};
  int64_t batch = 0, work = 0;

  explicit BackwardPlan(const std::vector<GramStage>& stages) {
    call.stages = stages.data();
    call.count = int64_t(stages.size());
    for (const GramStage& stage : stages) {
      batch = stage.x.batch;
      call.units_per_sample += stage.channel_blocks;
      for (int t = 0; t < stage.terms; ++t) work += stage.term[t].positions * stage.x.channels * stage.term[t].other.x.channels;
    }
  }
};

void run_backward(const BackwardPlan& plan, DType accumulate) {
  const GramBackward& call = plan.call;
  if (call.count == 0) return;
  const GramKernels& table = kernels().gram;
  const int which = index_of(accumulate);
  parallel_units(plan.batch * call.units_per_sample, plan.work / call.units_per_sample / kWorkPerElement + 1,
                 table.backward_scratch[which](call),
                 [&](int64_t begin, int64_t end, void* scratch) { table.backward[which](call, begin, end, scratch); });
}

// Forward and backward. What a unit computes is the same either way: it is done sample by sample, so that the backward finds a sample's
// maps in the cache, where the samples divide well among the threads, else pass by pass.
void run_training(const ForwardPlan& forward, const BackwardPlan& backward, DType accumulate) {
  const int64_t threads = torch::stable::get_num_threads();
  const bool by_sample = forward.batch % threads == 0 || forward.batch >= 8 * threads;
  if (backward.call.count == 0 || !by_sample) {
    run_forward(forward, accumulate);
    return run_backward(backward, accumulate);
  }
  const GramTraining call{forward.call, backward.call};
  const GramKernels& table = kernels().gram;
  const int which = index_of(accumulate);
  parallel_units(forward.batch, (forward.work + backward.work) / kWorkPerElement + 1, table.training_scratch[which](call),
                 [&](int64_t begin, int64_t end, void* scratch) { table.training[which](call, begin, end, scratch); });
}

void check_matrix_grad(const TensorView& m, int64_t batch, int64_t rows, int64_t columns, const char* name) {
  STD_TORCH_CHECK(m.dtype == DType::kFloat || m.dtype == DType::kDouble, name, " must be float32 or float64");
  STD_TORCH_CHECK(m.dim == 3 && m.sizes[0] == batch && m.sizes[1] == rows && m.sizes[2] == columns, name, " must have shape (", batch, ", ",
                  rows, ", ", columns, ")");
}

// float8 and the like never get here: view_of() refuses what is not one of the four dtypes.
template <class T>
void write_scalar(const Tensor& to, double value) {
  const T rounded = T(value);
  std::memcpy(to.data_ptr(), &rounded, sizeof rounded);
}

}  // namespace

Tensor fsp_matrix(const Tensor& a, const Tensor& b, const Text& pool_mode, std::optional<Text> precision) {
  check_precision(precision);
  const bool max = parse_switch(pool_mode, "pool_mode", "avg", "max");
  const Feature chain[2] = {feature_of(view_of(a, "a"), "a"), feature_of(view_of(b, "b"), "b")};
  check_alike(a, b, "b");
  const DType accumulate = accumulation(chain[0].dtype, chain[1].dtype);
  const int64_t sizes[3] = {chain[0].batch, chain[0].channels, chain[1].channels};
  Tensor out = empty(sizes, 3, accumulate);
  Pools pools;
  std::vector<GramPair> pairs{plan_pair(chain, nullptr, max, GramResult::kMatrix, pools)};
  pairs[0].out = out.data_ptr();
  run_forward(ForwardPlan(pairs, sizes[0]), accumulate);
  return out;
}

std::vector<Tensor> fsp_matrix_backward(const Tensor& grad, const Tensor& a, const Tensor& b, const Text& pool_mode,
                                        std::optional<Text> precision, bool a_grad, bool b_grad) {
  check_precision(precision);
  const bool max = parse_switch(pool_mode, "pool_mode", "avg", "max");
  const Feature fa = feature_of(view_of(a, "a"), "a"), fb = feature_of(view_of(b, "b"), "b");
  check_alike(a, b, "b");
  const TensorView m = view_of(grad, "grad");
  check_matrix_grad(m, fa.batch, fa.channels, fb.channels, "grad");
  const DType accumulate = accumulation(accumulation(fa.dtype, fb.dtype), m.dtype);
  Pools pools;
  GramOperand as_a, as_b;
  const int64_t positions = join(fa, fb, max, pools, as_a, as_b);
  std::vector<GramStage> stages;
  std::vector<Tensor> out;
  for (int side = 0; side < 2; ++side) {
    if (!(side == 0 ? a_grad : b_grad)) continue;
    GramStage stage{};
    stage.terms = 1;
    stage.term[0] = plan_term(side == 0 ? as_b : as_a, (side == 0 ? as_a : as_b).pool, positions, 1.0, m, side == 0 ? 1 : 2);
    out.push_back(plan_stage(stage, side == 0 ? a : b, accumulate));
    stages.push_back(stage);
  }
  run_backward(BackwardPlan(stages), accumulate);
  return out;
}

// The gradients of a chain's stages, planned from those of its Gram matrices and allocated.
struct ChainGradients {
  std::vector<GramStage> plans;
  std::vector<Tensor> out;
  Pools pools;
};

void plan_chain(ChainGradients& chain, const std::vector<Tensor>& features, const std::vector<Tensor>& gram_grads,
                const std::vector<int64_t>& stages, double upstream, bool max, DType accumulate) {
  const std::vector<Feature> f = features_of(features, "features");
  std::vector<TensorView> m;
  std::vector<GramOperand> as_a(gram_grads.size()), as_b(gram_grads.size());
  std::vector<int64_t> positions;
  for (size_t p = 0; p < gram_grads.size(); ++p) {
    check_alike(features[0], features[p + 1], "features");
    m.push_back(view_of(gram_grads[p], "gram_grads"));
    check_matrix_grad(m[p], f[p].batch, f[p].channels, f[p + 1].channels, "gram_grads");
    positions.push_back(join(f[p], f[p + 1], max, chain.pools, as_a[p], as_b[p]));
  }
  for (int64_t i : stages) {
    STD_TORCH_CHECK(i >= 0 && i < int64_t(f.size()), "stages must be indices of features, got ", i);
    GramStage plan{};
    if (i > 0) plan.term[plan.terms++] = plan_term(as_a[i - 1], as_b[i - 1].pool, positions[i - 1], upstream, m[i - 1], 2);
    if (i < int64_t(m.size())) plan.term[plan.terms++] = plan_term(as_b[i], as_a[i].pool, positions[i], upstream, m[i], 1);
    chain.out.push_back(plan_stage(plan, features[i], accumulate));
    chain.plans.push_back(plan);
  }
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> fsp_loss(std::vector<Tensor> student, std::vector<Tensor> teacher,
                                                                      const Text& pool_mode, const Text& distance, const Text& pair_reduce,
                                                                      std::optional<std::vector<double>> weights, double weight,
                                                                      std::optional<Text> precision, bool with_grad,
                                                                      std::optional<double> upstream, std::vector<int64_t> stages) {
  check_precision(precision);
  const bool max = parse_switch(pool_mode, "pool_mode", "avg", "max");
  const bool columns = distance.value == "column_l2";
  const bool mean = distance.value == "squared";
  STD_TORCH_CHECK(mean || columns || distance.value == "frobenius", "distance must be \"squared\", \"frobenius\" or \"column_l2\", got \"",
                  distance.value, "\"");
  const bool pair_mean = parse_switch(pair_reduce, "pair_reduce", "sum", "mean");
  STD_TORCH_CHECK(student.size() >= 2, "student must hold at least two stages, got ", student.size());
  STD_TORCH_CHECK(teacher.size() == student.size(), "student and teacher must hold equally many stages, got ", student.size(), " and ",
                  teacher.size());
  const size_t count = student.size() - 1;
  STD_TORCH_CHECK(!weights || weights->size() == count, "weights must hold one number a pair (", count, ")");
  const std::vector<Feature> s = features_of(student, "student"), t = features_of(teacher, "teacher");
  for (size_t i = 0; i <= count; ++i) {
    check_alike(student[0], student[i], "student");
    check_alike(student[0], teacher[i], "teacher");
    STD_TORCH_CHECK(s[i].channels == t[i].channels, "student and teacher must have equal channels, got ", s[i].channels, " and ",
                    t[i].channels, " in stage ", i);
  }
  const DType accumulate = accumulation_of(t, accumulation_of(s, DType::kFloat));
  Pools pools;
  std::vector<GramPair> pairs;
  std::vector<Tensor> grads;
  std::vector<double> factors;
  for (size_t p = 0; p < count; ++p) {
    const int64_t sizes[3] = {s[p].batch, s[p].channels, s[p + 1].channels};
    factors.push_back(weight * (weights ? (*weights)[p] : 1.0) / (pair_mean ? double(count) : 1.0) / double(sizes[0]) /
                      (mean ? double(sizes[1]) * double(sizes[2]) : 1.0));
    pairs.push_back(plan_pair(&s[p], &t[p], max, columns ? GramResult::kColumnNorms : GramResult::kSquares, pools));
    pairs.back().slope = columns ? factors.back() : 2.0 * factors.back();
    if (!with_grad) continue;
    grads.push_back(empty(sizes, 3, accumulate));
    pairs.back().out = grads.back().data_ptr();
  }
  STD_TORCH_CHECK(stages.empty() || (upstream && with_grad), "stages wants with_grad and the upstream gradient");
  ChainGradients gradients;
  if (!stages.empty()) plan_chain(gradients, student, grads, stages, *upstream, max, accumulate);
  const ForwardPlan forward(pairs, s[0].batch);
  run_training(forward, BackwardPlan(gradients.plans), accumulate);
  const std::vector<double> losses = forward.losses();
  double loss = 0.0;
  for (size_t p = 0; p < count; ++p) loss += factors[p] * losses[p];
  Tensor out = empty(nullptr, 0, accumulate);
  accumulate == DType::kDouble ? write_scalar<double>(out, loss) : write_scalar<float>(out, loss);
  return {out, grads, gradients.out};
}

std::vector<Tensor> fsp_loss_backward(const Tensor& grad, std::vector<Tensor> features, std::vector<Tensor> gram_grads,
                                      const Text& pool_mode, std::optional<Text> precision, std::vector<int64_t> stages, bool negate) {
  check_precision(precision);
  const bool max = parse_switch(pool_mode, "pool_mode", "avg", "max");
  STD_TORCH_CHECK(features.size() >= 2 && gram_grads.size() == features.size() - 1, "gram_grads must hold one matrix a pair of features");
  const double upstream = negate ? -scalar_of(grad, "grad") : scalar_of(grad, "grad");
  DType accumulate = accumulation_of(features_of(features, "features"), DType::kFloat);
  for (const Tensor& m : gram_grads) accumulate = accumulation(accumulate, view_of(m, "gram_grads").dtype);
  ChainGradients gradients;
  plan_chain(gradients, features, gram_grads, stages, upstream, max, accumulate);
  run_backward(BackwardPlan(gradients.plans), accumulate);
  return gradients.out;
}

}  // namespace fastkd

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("fsp_matrix", TORCH_BOX(&fastkd::fsp_matrix));
  m.impl("fsp_matrix_backward", TORCH_BOX(&fastkd::fsp_matrix_backward));
  m.impl("fsp_loss", TORCH_BOX(&fastkd::fsp_loss));
  m.impl("fsp_loss_backward", TORCH_BOX(&fastkd::fsp_loss_backward));
}
