// The forward kernel of FSP: tiles of G of one pair of features or, of a student's and a teacher's pairs, of
// what the loss is made of.
#pragma once

#include "cuda/fsp/sum.cuh"

namespace fastkd {

enum class FspResult : int32_t { kMatrix, kSquares, kColumnNorms };

struct PairArguments {
  Operand operand[4];  // student's a and b, teacher's a and b
  void* out;           // (N, Ca, Cb): G, or dloss/dG; null if not wanted
  double factor;       // of the pair in the loss
  int64_t scratch;     // where its tiles' sums begin
  int32_t chains;      // 1: G alone; 2: the difference of both
  int32_t difference;  // from the features' differences: all have as many positions
  int32_t row_tiles, column_tiles;
  int32_t first_block, first_group;  // a group: the tiles of some columns of one sample
};

struct ForwardArguments {
  static constexpr int kMost = 8;
  PairArguments pair[kMost];
  double *scratch, *terms;  // of each tile, or each of its columns; of each group
  unsigned* tickets;        // the loss's, then the groups'
  void* loss;
  int32_t pairs, groups;  // groups of all launches that add to the loss
  FspResult result;
};
static_assert(sizeof(ForwardArguments) <= 4096, "a kernel takes 4096 bytes of arguments at most");

// Bytes of shared memory: the sums; the operands, then, over them, the tile.
constexpr size_t kForwardSums = (kWarp + kFspThreads) * sizeof(double);
template <typename A>
FASTKD_BOTH constexpr size_t forward_shared(int chains) {
  const int operands = 2 * chains * kFspTile * 32, sums = kFspTile * (kFspTile + 1) + 64;
  return kForwardSums + (operands > sums ? operands : sums) * sizeof(A);
}

// Adds the products of a pair's operands from `operand` on: of two chains at once, or of one.
template <typename A, Mode MODE>
FASTKD_DEVICE void add_products(FspSum<A, MODE>& sum, const Cut& cut, const Operand* operand, bool difference,
                                int64_t n, int row, int column, A* tiles) {
  constexpr int kSize = kFspTile * 32;
  const int rows = operand[0].channels - row, columns = operand[1].channels - column,
            positions = operand[0].positions;
  const int operands = difference ? 4 : 2;
  const Staged<A> own = {tiles, tiles + kSize, operand[0].exact, operand[1].exact};
  const Staged<A> less = {tiles + 2 * kSize, tiles + 3 * kSize, difference && operand[2].exact, false};
  FASTKD_ROLLED
  for (int s = 0; s < positions; s += cut.depth) {
    FASTKD_ROLLED
    for (int i = 0; i < operands; ++i) {
      const bool is_b = i % 2;
      stage<A, true>(operand[i], n, tiles + i * kSize, is_b ? column : row, is_b ? cut.columns : cut.rows, s,
                     cut.depth);
    }
    sync_block();
    const int terms = positions - s < cut.depth ? positions - s : cut.depth;
    if (difference) {
      sum.template add<true, true>(cut, own, less, rows, columns, terms);
    } else {
      sum.template add<false, true>(cut, own, less, rows, columns, terms);
    }
    sync_block();
  }
}

template <typename A, Mode MODE>
FASTKD_KERNEL_OF(kFspThreads, (kFspBlocks<A, MODE>))
fsp_forward(FASTKD_ARGUMENTS(ForwardArguments) call) {
  constexpr bool kIsIeee = MODE == Mode::kIeee;
  int p = 0;
  while (p + 1 < call.pairs && static_cast<int>(blockIdx.x) >= call.pair[p + 1].first_block) ++p;
  const PairArguments& pair = call.pair[p];
  const int local = static_cast<int>(blockIdx.x) - pair.first_block, row_tile = local % pair.row_tiles,
            group = local / pair.row_tiles;
  const int row0 = row_tile * kFspTile, column0 = group % pair.column_tiles * kFspTile;
  const int64_t n = group / pair.column_tiles, a_channels = pair.operand[0].channels,
                b_channels = pair.operand[1].channels;
  const Cut cut = cut_of(pair.operand[0].channels, pair.operand[1].channels, threadIdx.x / kWarp);
  double *scratch = reinterpret_cast<double*>(shared_memory()), *column_sums = scratch + kWarp;
  A* tiles = reinterpret_cast<A*>(shared_memory() + kForwardSums);

  FspSum<A, MODE> sum;
  sum.clear();
  A scale = inverse_of<A>(pair.operand[0].positions);
  const int passes = pair.difference ? 1 : pair.chains;
  FASTKD_ROLLED
  for (int i = 0; i < passes; ++i) {
    if (i == 1) {
      sum.times(-scale * static_cast<A>(pair.operand[2].positions));
      scale = -inverse_of<A>(pair.operand[2].positions);
    }
    add_products(sum, cut, pair.operand + 2 * i, pair.difference, n, row0, column0, tiles);
  }
  sum.lay_out(cut, tiles);
  sync_block();

  // a thread stays in its column
  const int bits = bits_of_size(cut.columns), column = threadIdx.x & (cut.columns - 1),
            step = kFspThreads >> bits;
  const int rows = a_channels - row0 < cut.rows ? static_cast<int>(a_channels) - row0 : cut.rows;
  const int columns =
      b_channels - column0 < cut.columns ? static_cast<int>(b_channels) - column0 : cut.columns;
  A* out = static_cast<A*>(pair.out);
  if (out != nullptr) out += n * a_channels * b_channels + column0 + column;
  const A slope = call.result == FspResult::kSquares ? static_cast<A>(2 * pair.factor) : A(1);
  A squares = 0;
  for (int row = threadIdx.x >> bits; row < rows && column < columns; row += step) {
    const A d = laid_out(tiles, cut, kIsIeee, row, column) * scale;
    squares += d * d;
    if (out != nullptr) out[(row0 + row) * b_channels] = call.result == FspResult::kMatrix ? d : d * slope;
  }
  if (call.result == FspResult::kMatrix) return;

  double* tile_sums = call.scratch + pair.scratch;
  const bool by_column = call.result == FspResult::kColumnNorms;
  if (by_column) {
    column_sums[threadIdx.x] = static_cast<double>(squares);
    sync_block();
    tile_sums += static_cast<int64_t>(group) * pair.row_tiles * kFspTile;
    if (static_cast<int>(threadIdx.x) < columns) {
      double total = 0;
      for (int i = 0; i < step; ++i) total += column_sums[i * cut.columns + threadIdx.x];
      tile_sums[row_tile * kFspTile + threadIdx.x] = total;
    }
  } else {
    const double total = block_sum(static_cast<double>(squares), scratch, kFspThreads);
    tile_sums += static_cast<int64_t>(group) * pair.row_tiles;
    if (threadIdx.x == 0) tile_sums[row_tile] = total;
  }
  if (!is_last(call.tickets + 1 + pair.first_group + group, pair.row_tiles)) return;

  double term = 0;
  if (by_column) {
    if (static_cast<int>(threadIdx.x) < columns) {
      for (int i = 0; i < pair.row_tiles; ++i) term += load_fresh(tile_sums + i * kFspTile + threadIdx.x);
      term = sqrt(term);
      column_sums[threadIdx.x] = term == 0 ? 0 : pair.factor / term;
    }
  } else {
    for (int i = threadIdx.x; i < pair.row_tiles; i += kFspThreads) term += load_fresh(tile_sums + i);
  }
  term = block_sum(term, scratch, kFspThreads);
  if (by_column && out != nullptr) {
    const A slope = column < columns ? static_cast<A>(column_sums[column]) : A(0);
    for (int64_t row = threadIdx.x >> bits; row < a_channels && column < columns; row += step) {
      out[row * b_channels] = load_fresh(out + row * b_channels) * slope;
    }
  }
  if (threadIdx.x == 0) call.terms[pair.first_group + group] = term * pair.factor;
  if (!is_last(call.tickets, call.groups)) return;
  double loss = 0;
  for (int i = threadIdx.x; i < call.groups; i += kFspThreads) loss += load_fresh(call.terms + i);
  loss = block_sum(loss, scratch, kFspThreads);
  if (threadIdx.x == 0) *static_cast<A*>(call.loss) = static_cast<A>(loss);
}

}  // namespace fastkd
