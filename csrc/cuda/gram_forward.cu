// Launches of the forward kernel.
#include "cuda/gram_launch.cuh"

namespace fastkd {

#ifdef FASTKD_EMULATE
int gram_wide = -1;
extern "C" __attribute__((visibility("default"))) void fastkd_gram_wide(int wanted) { gram_wide = wanted; }
#endif

namespace {

template <typename A, Mode MODE, int MI>
void launch_one(const GramCall& call, const ForwardArguments& arguments, int64_t blocks, int chains) {
  launch("gram_forward", gram_forward<A, MODE, MI>, blocks, kGramThreads<MI>, forward_shared<A, MI>(chains), call.device, arguments);
}

template <Mode MODE>
void launch_mode(const GramCall& call, const ForwardArguments& arguments, int64_t blocks, int chains, bool wide) {
  wide ? launch_one<float, MODE, 4>(call, arguments, blocks, chains) : launch_one<float, MODE, 2>(call, arguments, blocks, chains);
}

void launch_forward(const GramCall& call, const ForwardArguments& arguments, int64_t blocks, int chains, bool wide) {
  if (call.accumulate == DType::kDouble) return launch_one<double, Mode::kIeee, 2>(call, arguments, blocks, chains);
  if (call.mode == Mode::kIeee) return launch_one<float, Mode::kIeee, 2>(call, arguments, blocks, chains);
  if (call.mode == Mode::kTf32) return launch_mode<Mode::kTf32>(call, arguments, blocks, chains, wide);
  if (call.mode == Mode::kTf32x3) return launch_mode<Mode::kTf32x3>(call, arguments, blocks, chains, wide);
  launch_mode<Mode::kBf16>(call, arguments, blocks, chains, wide);
}

}  // namespace

void run_forward(GramCall& call, std::vector<PairArguments> pairs, int64_t samples, GramResult result, void* loss) {
  std::vector<bool> wide;
  int64_t groups = 0, scratch = 0;
  for (PairArguments& pair : pairs) {
    const int64_t rows = pair.operand[0].channels, columns = pair.operand[1].channels;
    wide.push_back(is_wide(call.mode, samples, rows, columns));
    const int64_t tile = wide.back() ? 128 : 64;
    pair.row_tiles = static_cast<int32_t>(tiles_of(rows, tile));
    pair.column_tiles = static_cast<int32_t>(tiles_of(columns, tile));
    pair.first_group = static_cast<int32_t>(groups);
    pair.scratch = scratch;
    groups += samples * pair.column_tiles;
    grid_of("gram_forward", groups * pair.row_tiles);
    scratch += samples * pair.column_tiles * pair.row_tiles * (result == GramResult::kColumnNorms ? tile : 1);
  }
  ForwardArguments arguments{};
  arguments.result = result;
  arguments.loss = loss;
  arguments.groups = static_cast<int32_t>(groups);
  if (result != GramResult::kMatrix) {
    const int64_t doubles = groups + scratch, tickets = 1 + groups;
    arguments.terms = static_cast<double*>(call.keep(call.device.empty(&doubles, 1, DType::kDouble)));
    arguments.scratch = arguments.terms + groups;
    arguments.tickets = static_cast<unsigned*>(call.keep(call.device.tickets(tickets)));
  }
  call.pool();
  for (const bool now : {false, true}) {
    int64_t blocks = 0;
    const auto flush = [&] {
      if (arguments.pairs) launch_forward(call, arguments, blocks, result == GramResult::kMatrix ? 1 : 2, now);
      arguments.pairs = 0;
      blocks = 0;
    };
    for (size_t p = 0; p < pairs.size(); ++p) {
      if (wide[p] != now) continue;
      if (arguments.pairs == ForwardArguments::kMost) flush();
      pairs[p].first_block = static_cast<int32_t>(blocks);
      arguments.pair[arguments.pairs++] = pairs[p];
      blocks += samples * pairs[p].row_tiles * pairs[p].column_tiles;
      grid_of("gram_forward", blocks);
    }
    flush();
  }
}

}  // namespace fastkd
