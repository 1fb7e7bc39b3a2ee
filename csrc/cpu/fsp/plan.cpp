#include "cpu/fsp/plan.h"

#include <algorithm>

#include "cpu/memory.h"

namespace fastkd {
namespace {

// 16 multiply-adds cost about as much as one element of a streaming pass.
constexpr int64_t kWorkPerElement = 16;

int index_of(DType accumulate) { return accumulate == DType::kDouble ? 1 : 0; }

bool same_size(const Feature& a, const Feature& b) { return std::equal(a.size, a.size + 3, b.size); }

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Near-equal blocks of at most `most`, in multiples of `unit`.
int64_t block_of(int64_t total, int64_t most, int64_t unit) {
  const int64_t blocks = (total + most - 1) / most;
  return std::min(total, round_up((total + blocks - 1) / blocks, unit));
}

// Whether operand_block() gives planes.
bool is_planes(const FspOperand& operand) {
  return operand.x.layout != Layout::kChannelsLast || (operand.pool.active && operand.pool.max);
}

// Fewer positions than these do not pay for adding up the lanes of a vector for every element of G; a G of
// more elements than those is worth transposing the maps.
constexpr int64_t kPlanePositions = 64, kPlaneProducts = 2048;

// Channels whose products are summed in registers before they are added to the others: numbers that are
// alike, added one after the other, are all rounded in one direction.
constexpr int64_t kLowRankDepth = 32;

// Whether a pair's loss and gradients are made from products over channels, positions x positions
// (fsp/low_rank.inl): with the gradients about 6 Ca K^2 + 4 Cb K^2 multiplications a sample and no matrix,
// where the matrix takes 4 Ca Cb K. fastkd/kernels/fsp/saved.py has the same rule.
bool takes_low_rank(const FspPair& pair) {
  if (pair.chains != 2 || !pair.fused || pair.result != FspResult::kSquares) return false;
  for (int chain = 0; chain < 2; ++chain) {
    for (const FspOperand* operand : {&pair.a[chain], &pair.b[chain]}) {
      // one channel seen many times: the sums over channels would round in one direction
      if (operand->x.stride_c == 0 && operand->x.channels > 1) return false;
    }
  }
  const int64_t ca = pair.a[0].x.channels, cb = pair.b[0].x.channels;
  return 5 * (ca + cb) * pair.positions[0] <= 3 * ca * cb;
}

// During how many multiply-adds the next sample's maps are asked for: all of a sample's, or 0.
int64_t work_ahead(const FspForward& call, int64_t work) {
  int64_t bytes = 0;
  for (int64_t p = 0; p <= call.count; ++p) {
    const FspPair& pair = call.pairs[std::min(p, call.count - 1)];
    for (int32_t t = 0; t < pair.chains; ++t) {
      const Feature& x = (p < call.count ? pair.a : pair.b)[t].x;
      bytes += bytes_of(x) / std::max<int64_t>(x.batch, 1);
    }
  }
  return asks_ahead(bytes) ? work : 0;
}

// Whether the gradient is written past the caches: it is too large to stay there, and gemm() can (see
// Gemm::stream).
bool streams(const FspStage& stage) {
  const Feature& x = stage.grad;
  const int64_t line = 64 / size_of(x.dtype);
  bool can = reinterpret_cast<uintptr_t>(x.data) % 64 == 0 && x.stride_n % line == 0;
  can = can && (stage.channels_last ? x.channels % line == 0 && x.stride_s % line == 0
                                    : x.positions % line == 0 && x.stride_c % line == 0);
  for (int t = 0; t < stage.terms; ++t) {
    const FspTerm& term = stage.term[t];
    can = can && (term.low_rank ? 2 * term.positions : term.other.x.channels) <= kGemmDepth;
  }
  return can && streams_past_caches(bytes_of(x));
}

// AMX: fewer channels than kTileChannels leave most of a tile empty. What a unit packs at a time (numbers of
// one chain) and its rows of G (512 KiB of floats) stay in the second-level cache.
constexpr int64_t kTileChannels = 16, kTileNumbers = 262144, kTileProducts = 131072;

// Whether a pair's products are those of AMX (fsp/amx.inl): all maps are bfloat16 in one of the two usual
// layouts, and only A is averaged, if at all, over windows of 2 x 2.
bool takes_tiles(const FspPair& pair) {
  if (pair.a[0].x.channels < kTileChannels || pair.b[0].x.channels < kTileChannels ||
      (pair.chains == 2 && !pair.fused))
    return false;
  for (int chain = 0; chain < pair.chains; ++chain) {
    for (const FspOperand* operand : {&pair.a[chain], &pair.b[chain]}) {
      if (operand->x.dtype != DType::kBFloat16 || operand->x.layout == Layout::kGeneric) return false;
    }
    const PoolPlan& pool = pair.a[chain].pool;
    if (pair.b[chain].pool.active || (pool.active && pool.max)) return false;
    if (pool.active &&
        (pool.in[0] != pool.out[0] || pool.in[1] != 2 * pool.out[1] || pool.in[2] != 2 * pool.out[2]))
      return false;
  }
  return tiles_available();
}

// The same of a term of a gradient: both maps are bfloat16, the other one, averaged or not, in the layout of
// the gradient.
bool takes_tiles(const FspStage& stage, const FspTerm& term) {
  const FspOperand& other = term.other;
  if (stage.grad.dtype != DType::kBFloat16 || other.x.dtype != DType::kBFloat16 ||
      term.m_dtype != DType::kFloat)
    return false;
  if (stage.grad.channels < kTileChannels || other.x.channels < kTileChannels ||
      other.x.layout == Layout::kGeneric)
    return false;
  return stage.channels_last == !is_planes(other) && tiles_available();
}

}  // namespace

int64_t join(const Feature& a, const Feature& b, bool max, Pools& pools, FspOperand& as_a, FspOperand& as_b) {
  int64_t size[3], positions = 1;
  for (int d = 0; d < 3; ++d) positions *= size[d] = std::min(a.size[d], b.size[d]);
  as_a = {a, pools.make(a, size, max)};
  as_b = {b, pools.make(b, size, max)};
  return positions;
}

FspPair plan_pair(const Feature* student, const Feature* teacher, bool max, FspResult result,
                  bool may_low_rank, Pools& pools) {
  FspPair pair{};
  pair.chains = teacher ? 2 : 1;
  pair.positions[0] = join(student[0], student[1], max, pools, pair.a[0], pair.b[0]);
  if (teacher) {
    pair.positions[1] = join(teacher[0], teacher[1], max, pools, pair.a[1], pair.b[1]);
    pair.fused = same_size(student[0], teacher[0]) && same_size(student[1], teacher[1]);
  }
  pair.result = result;
  const int64_t ca = student[0].channels, cb = student[1].channels;
  pair.low_rank = may_low_rank && takes_low_rank(pair);
  if (pair.low_rank) {
    pair.rows = ca, pair.row_blocks = 1;
    pair.depth = std::min(kLowRankDepth, std::max(ca, cb));
    return pair;
  }
  // A unit's rows of G stay in the second-level cache (256 KiB of floats) while the products are added up.
  // The norms of columns need all rows.
  pair.tiles = takes_tiles(pair);
  pair.rows = result == FspResult::kColumnNorms
                  ? ca
                  : block_of(ca, std::max<int64_t>(64, (pair.tiles ? kTileProducts : 65536) / cb), 16);
  pair.row_blocks = (ca + pair.rows - 1) / pair.rows;
  if (pair.tiles) {
    const PoolPlan& pool = pair.a[0].pool;
    const int64_t line = pool.active ? pool.out[2] : 1, total = pair.positions[0] / line;
    const int64_t most = kTileNumbers / (pool.active ? 4 * pair.rows + 2 * cb : pair.rows + cb) / line;
    pair.depth = block_of(total, std::max<int64_t>(most, pool.active ? 1 : 32), pool.active ? 1 : 32);
    return pair;
  }
  const int64_t positions = std::max(pair.positions[0], pair.positions[1]);
  pair.planes = positions >= kPlanePositions && ca * cb <= kPlaneProducts;
  for (int chain = 0; chain < pair.chains; ++chain)
    pair.planes = pair.planes && is_planes(pair.a[chain]) && is_planes(pair.b[chain]);
  if (pair.planes) {
    // The panels (of two maps in the difference form) take 32 KiB: the first-level cache, mostly.
    pair.depth = block_of(positions, std::max<int64_t>(64, 4096 / pair.rows), 16);
    return pair;
  }
  // The packed positions of all operands stay in the first-level cache (32 KiB) if that leaves enough of them
  // for a product to be efficient; else one panel of the right operand does (gemm.inl).
  const int64_t width = pair.chains * (pair.rows + cb);
  pair.depth = block_of(positions, std::min<int64_t>(512, std::max<int64_t>(128, 8192 / width)), 16);
  return pair;
}

void run_forward(const ForwardPlan& plan, DType accumulate) {
  FspForward call = plan.call;
  call.work_ahead = work_ahead(call, plan.work);
  const FspKernels& table = kernels().fsp;
  const int which = index_of(accumulate);
  parallel_units(int64_t(plan.partial.size()), plan.work / call.units_per_sample / kWorkPerElement + 1,
                 table.forward_scratch[which](call), [&](int64_t begin, int64_t end, void* scratch) {
                   table.forward[which](call, begin, end, scratch);
                 });
}

FspTerm plan_term(const FspOperand& other, const PoolPlan& own, int64_t positions, double upstream,
                  const TensorView& m, int channel_dim) {
  FspTerm term{};
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

Tensor plan_stage(FspStage& stage, const Tensor& x, DType accumulate) {
  const TensorView view = view_of(x, "feature");
  Tensor grad = empty_like(x, view);
  stage.x = feature_of(view, "feature");
  stage.grad = feature_of(view_of(grad, "gradient"), "gradient");
  // Un-pooling a maximum looks its position up in planes.
  bool planes = false;
  for (int t = 0; t < stage.terms; ++t)
    planes = planes || (stage.term[t].own.active && stage.term[t].own.max);
  stage.channels_last = stage.grad.layout == Layout::kChannelsLast && !planes;
  stage.direct =
      stage.grad.dtype == accumulate && (stage.channels_last || stage.grad.layout == Layout::kPlanes);
  stage.stream = stage.direct && streams(stage);
  // A block's gradient stays in the second-level cache when it has to be converted or spread out afterwards.
  // Every block pools the other map again.
  bool pools = false, tiles = false;
  for (int t = 0; t < stage.terms; ++t) {
    FspTerm& term = stage.term[t];
    pools = pools || term.other.pool.active;
    term.tiles = !term.low_rank && takes_tiles(stage, term);
    tiles = tiles || term.tiles;
  }
  int64_t most = stage.direct ? (pools ? 512 : 128) : std::max<int64_t>(32, 65536 / stage.grad.positions);
  if (tiles) most = std::max<int64_t>(64, most);  // each block packs the other map again
  stage.channels = block_of(stage.grad.channels, most, 16);
  stage.channel_blocks = (stage.grad.channels + stage.channels - 1) / stage.channels;
  return grad;
}

void run_backward(const BackwardPlan& plan, DType accumulate) {
  const FspBackward& call = plan.call;
  if (call.count == 0) return;
  const FspKernels& table = kernels().fsp;
  const int which = index_of(accumulate);
  parallel_units(plan.batch * call.units_per_sample, plan.work / call.units_per_sample / kWorkPerElement + 1,
                 table.backward_scratch[which](call), [&](int64_t begin, int64_t end, void* scratch) {
                   table.backward[which](call, begin, end, scratch);
                 });
}

void run_training(const ForwardPlan& forward, const BackwardPlan& backward, DType accumulate) {
  const int64_t threads = torch::stable::get_num_threads();
  const bool by_sample = forward.batch % threads == 0 || forward.batch >= 8 * threads;
  if (backward.call.count == 0 || !by_sample) {
    run_forward(forward, accumulate);
    return run_backward(backward, accumulate);
  }
  FspTraining call{forward.call, backward.call};
  call.forward.work_ahead = work_ahead(call.forward, forward.work + backward.work);
  const FspKernels& table = kernels().fsp;
  const int which = index_of(accumulate);
  parallel_units(forward.batch, (forward.work + backward.work) / kWorkPerElement + 1,
                 table.training_scratch[which](call), [&](int64_t begin, int64_t end, void* scratch) {
                   table.training[which](call, begin, end, scratch);
                 });
}

}  // namespace fastkd
