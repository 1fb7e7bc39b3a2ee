// Launches of the forward kernel.
#include "cuda/fsp/plan.cuh"

namespace fastkd {

namespace {

template <typename A, Mode MODE>
void launch_one(const FspCall& call, const ForwardArguments& arguments, int64_t blocks, int chains) {
  launch("fsp_forward", fsp_forward<A, MODE>, blocks, kFspThreads, forward_shared<A>(chains), call.device,
         arguments);
}

void launch_forward(const FspCall& call, const ForwardArguments& arguments, int64_t blocks, int chains) {
  if (call.accumulate == DType::kDouble)
    return launch_one<double, Mode::kIeee>(call, arguments, blocks, chains);
  if (call.mode == Mode::kIeee) return launch_one<float, Mode::kIeee>(call, arguments, blocks, chains);
  if (call.mode == Mode::kTf32) return launch_one<float, Mode::kTf32>(call, arguments, blocks, chains);
  if (call.mode == Mode::kTf32x3) return launch_one<float, Mode::kTf32x3>(call, arguments, blocks, chains);
  launch_one<float, Mode::kBf16>(call, arguments, blocks, chains);
}

}  // namespace

void run_forward(FspCall& call, std::vector<PairArguments> pairs, int64_t samples, FspResult result,
                 void* loss) {
  int64_t groups = 0, scratch = 0;
  for (PairArguments& pair : pairs) {
    const int64_t rows = pair.operand[0].channels, columns = pair.operand[1].channels;
    pair.row_tiles = tiles_of(rows);
    pair.column_tiles = tiles_of(columns);
    pair.first_group = static_cast<int32_t>(groups);
    pair.scratch = scratch;
    groups += samples * pair.column_tiles;
    grid_of("fsp_forward", groups * pair.row_tiles);
    scratch +=
        samples * pair.column_tiles * pair.row_tiles * (result == FspResult::kColumnNorms ? kFspTile : 1);
  }
  ForwardArguments arguments{};
  arguments.result = result;
  arguments.loss = loss;
  arguments.groups = static_cast<int32_t>(groups);
  if (result != FspResult::kMatrix) {
    const int64_t doubles = groups + scratch;
    arguments.terms = static_cast<double*>(call.keep(call.device.empty(&doubles, 1, DType::kDouble)));
    arguments.scratch = arguments.terms + groups;
    const Tickets tickets = call.device.tickets(1 + groups);
    arguments.tickets = tickets.first;
    if (tickets.memory) call.keep(*tickets.memory);
  }
  call.pool();
  int64_t blocks = 0;
  const auto flush = [&] {
    if (arguments.pairs) launch_forward(call, arguments, blocks, result == FspResult::kMatrix ? 1 : 2);
    arguments.pairs = 0;
    blocks = 0;
  };
  for (PairArguments& pair : pairs) {
    if (arguments.pairs == ForwardArguments::kMost) flush();
    pair.first_block = static_cast<int32_t>(blocks);
    blocks += samples * pair.row_tiles * pair.column_tiles;
    grid_of("fsp_forward", blocks);
    arguments.pair[arguments.pairs++] = pair;
  }
  flush();
}

}  // namespace fastkd
