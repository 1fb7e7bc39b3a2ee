// Contrastive distillation against drawn rows of a bank: the order of the rows, the positives, and the
// division among threads. The pass over the negatives is in crd.inl, the schemas in fastkd/ops/crd.py.
#include "cpu/crd/crd.h"

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <tuple>
#include <utility>

#include "cpu/dispatch.h"
#include "cpu/host.h"

namespace fastkd {
namespace {

// Numbers of a tile of the bank: 32 KiB, which the first-level cache holds.
constexpr int64_t kTileNumbers = 1 << 13;
// Draws that an image has in a tile on average, where tiles can be large enough for it.
constexpr int64_t kTileDraws = 16;
// A row within a tile is a number of 16 bits.
constexpr int kMostShift = 16;
// Blocks of tiles, which are shared among threads.
constexpr int64_t kBlocks = 32;
// Most numbers of the gradients of all blocks together.
constexpr int64_t kBlockNumbers = 4 << 20;

struct Bank {
  const float* data;
  int64_t size, width;
};

const float* floats_of(const Tensor& tensor, int64_t rows, int64_t columns, const char* name) {
  return static_cast<const float*>(matrix_of(tensor, DType::kFloat, rows, columns, name));
}

int64_t tiles_of(int64_t size, int64_t width, int64_t drawn, int* shift) {
  const int64_t wanted = std::max(kTileNumbers / width, (kTileDraws * size + drawn - 1) / drawn);
  for (*shift = 0; *shift < kMostShift && (int64_t{2} << *shift) <= wanted; ++*shift) {
  }
  return ((size - 1) >> *shift) + 1;
}

// The drawn negatives of each image, sorted by the tile of the bank that they lie in.
struct Draws {
  int64_t count, drawn, tiles;
  int shift = 0;        // tiles have 2^shift rows
  const int64_t* rows;  // (count, drawn + 1)
  torch::stable::Tensor order, starts;

  Draws(const torch::stable::Tensor& given, int64_t images, const Bank& bank)
      : count(images), drawn(given.size(1) - 1), rows(nullptr) {
    tiles = tiles_of(bank.size, bank.width, drawn, &shift);
    rows = static_cast<const int64_t*>(given.const_data_ptr());
    order = torch::stable::new_empty(given, {count, drawn}, torch::headeronly::ScalarType::Short);
    starts = torch::stable::new_empty(given, {count, tiles + 1}, torch::headeronly::ScalarType::Int);
    auto* placed = static_cast<uint16_t*>(order.mutable_data_ptr());
    auto* first = static_cast<int32_t*>(starts.mutable_data_ptr());
    std::atomic<bool> outside{false};
    parallel_units(count, drawn, 0, [&](int64_t begin, int64_t end, void*) {
      for (int64_t i = begin; i < end; ++i)
        if (!sort(rows + i * (drawn + 1), bank.size, placed + i * drawn, first + i * (tiles + 1)))
          outside.store(true, std::memory_order_relaxed);
    });
    STD_TORCH_CHECK(!outside.load(), "rows must be rows of the banks");
  }

  // Counts, then places. After placing, next[tile + 1] has moved from where a tile begins to where it ends.
  bool sort(const int64_t* from, int64_t size, uint16_t* to, int32_t* next) const {
    std::fill(next, next + tiles + 1, 0);
    bool inside = from[0] >= 0 && from[0] < size;
    for (int64_t k = 1; k <= drawn; ++k) {
      __builtin_prefetch(from + k + 128);
      if (static_cast<uint64_t>(from[k]) >= static_cast<uint64_t>(size)) return false;
      ++next[(from[k] >> shift) + 1];
    }
    const int64_t within = (int64_t{1} << shift) - 1;
    int32_t before = 0;  // the draws of all earlier tiles
    for (int64_t tile = 1; tile <= tiles; ++tile) before += std::exchange(next[tile], before);
    for (int64_t k = 1; k <= drawn; ++k)
      to[next[(from[k] >> shift) + 1]++] = static_cast<uint16_t>(from[k] & within);
    return inside;
  }
};

struct Direction {
  double loss = 0, normalizer = 0;
};

struct Formula {
  double temperature, eps, weight;
};

double product(const float* a, const float* b, int64_t width) {
  double total = 0;
  for (int64_t k = 0; k < width; ++k) total += static_cast<double>(a[k]) * static_cast<double>(b[k]);
  return total;
}

double over_blocks(const CrdArgs& args, int64_t work) {
  const auto run = kernels().crd.blocks;
  parallel_units(args.blocks, work / args.blocks, 0,
                 [&](int64_t begin, int64_t end, void*) { run(args, begin, end); });
  double total = 0;
  for (int64_t i = 0; i < args.blocks; ++i) total += args.sums[i];
  return total;
}

// One network's embeddings x against the other's bank. A gradient is written where `grad` is not null.
Direction direction(const float* x, const Bank& bank, const Draws& draws, double given,
                    const Formula& formula, float* grad) {
  const int64_t n = draws.count, width = bank.width, numbers = n * width;
  const int64_t blocks =
      std::max<int64_t>(1, std::min({draws.tiles, kBlocks, kBlockNumbers / std::max<int64_t>(1, numbers)}));
  const double noise = static_cast<double>(draws.drawn) / static_cast<double>(bank.size);
  std::vector<double> sums(static_cast<size_t>(blocks)), scores(static_cast<size_t>(n));
  CrdArgs args = {CrdMode::kOdds,
                  n,
                  width,
                  draws.drawn,
                  draws.tiles,
                  blocks,
                  bank.size,
                  int64_t{1} << draws.shift,
                  n * draws.drawn >= bank.size,
                  x,
                  bank.data,
                  static_cast<const uint16_t*>(draws.order.const_data_ptr()),
                  static_cast<const int32_t*>(draws.starts.const_data_ptr()),
                  static_cast<float>(1 / formula.temperature),
                  0,
                  0,
                  sums.data(),
                  nullptr};
  const int64_t work = n * draws.drawn * width;
  const auto positive = [&](int64_t i) { return bank.data + draws.rows[i * (draws.drawn + 1)] * width; };
  for (int64_t i = 0; i < n; ++i)
    scores[static_cast<size_t>(i)] = product(x + i * width, positive(i), width) / formula.temperature;
  Direction found;
  found.normalizer = given;
  if (!(given > 0)) {
    double odds = over_blocks(args, work);
    for (double score : scores) odds += std::exp(score);
    found.normalizer = odds / static_cast<double>(n * (draws.drawn + 1)) * static_cast<double>(bank.size);
  }
  args.inverse = static_cast<float>(1 / (found.normalizer * noise));
  args.shift = static_cast<float>(formula.eps / noise);
  args.mode = grad ? CrdMode::kGradient : CrdMode::kLoss;
  Tensor parts;
  if (grad) {
    const int64_t shape[2] = {blocks, numbers};
    parts = empty(shape, 2, DType::kFloat);
    args.grads = static_cast<float*>(parts.mutable_data_ptr());
  }
  const double factor = formula.weight / static_cast<double>(n);
  found.loss = over_blocks(args, work);
  // log((P + noise + eps) / P) of the positives, by the logarithm of P
  const double level = std::log(noise + formula.eps) + std::log(found.normalizer);
  for (int64_t i = 0; i < n; ++i) {
    const double against = level - scores[static_cast<size_t>(i)];
    found.loss += std::max(against, 0.0) + std::log1p(std::exp(-std::abs(against)));
    if (!grad) continue;
    const double slope = -1 / (1 + std::exp(-against));
    const float* row = positive(i);
    for (int64_t k = 0; k < width; ++k) {
      double total = slope * static_cast<double>(row[k]);
      for (int64_t block = 0; block < blocks; ++block)
        total += static_cast<double>(args.grads[block * numbers + i * width + k]);
      grad[i * width + k] = static_cast<float>(factor / formula.temperature * total);
    }
  }
  found.loss *= factor;
  return found;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> crd_pass(const Tensor& s, const Tensor& t, const Tensor& s_bank,
                                                    const Tensor& t_bank, const torch::stable::Tensor& rows,
                                                    const Tensor& given, double temperature, double eps,
                                                    double weight, bool need_s, bool need_t) {
  const TensorView embeddings = view_of(s, "s"), banks = view_of(t_bank, "t_bank");
  STD_TORCH_CHECK(embeddings.dim == 2 && banks.dim == 2, "s and t_bank must have two dimensions");
  const int64_t n = embeddings.sizes[0], width = embeddings.sizes[1], size = banks.sizes[0];
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(n > 0 && width > 0 && size > 0 && size <= kMost,
                  "s and t_bank must not be empty, and t_bank of at most ", kMost, " rows");
  const float* x[2] = {floats_of(s, n, width, "s"), floats_of(t, n, width, "t")};
  const Bank bank[2] = {{floats_of(t_bank, size, width, "t_bank"), size, width},
                        {floats_of(s_bank, size, width, "s_bank"), size, width}};
  STD_TORCH_CHECK(rows.scalar_type() == torch::headeronly::ScalarType::Long && rows.dim() == 2 &&
                      rows.size(0) == n && rows.size(1) > 1 && rows.size(1) <= kMost &&
                      rows.is_contiguous() && rows.is_cpu(),
                  "rows must be int64, (", n, ", K + 1), contiguous, on the CPU");
  const TensorView view = view_of(given, "given");
  STD_TORCH_CHECK(view.dtype == DType::kFloat && view.dim == 1 && view.sizes[0] == 2,
                  "given must be two numbers in float32");
  const auto* normalizers = static_cast<const float*>(view.data);
  const Draws draws(rows, n, bank[0]);
  const bool needs[2] = {need_s, need_t};
  const int64_t none = 0, shape[2] = {n, width}, two = 2;
  Tensor grads[2] = {need_s ? empty(shape, 2, DType::kFloat) : empty(&none, 1, DType::kFloat),
                     need_t ? empty(shape, 2, DType::kFloat) : empty(&none, 1, DType::kFloat)};
  Tensor loss = empty(nullptr, 0, DType::kFloat), found = empty(&two, 1, DType::kFloat);
  double total = 0;
  for (int i = 0; i < 2; ++i) {
    float* grad = needs[i] ? static_cast<float*>(grads[i].mutable_data_ptr()) : nullptr;
    const Direction side =
        direction(x[i], bank[i], draws, static_cast<double>(normalizers[i * view.strides[0]]),
                  {temperature, eps, weight}, grad);
    total += side.loss;
    static_cast<float*>(found.mutable_data_ptr())[i] = static_cast<float>(side.normalizer);
  }
  *static_cast<float*>(loss.mutable_data_ptr()) = static_cast<float>(total);
  return {std::move(loss), std::move(found), std::move(grads[0]), std::move(grads[1])};
}

}  // namespace
}  // namespace fastkd

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) { m.impl("crd_pass", FASTKD_BOX(fastkd::crd_pass)); }
