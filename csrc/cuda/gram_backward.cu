// Launches of the backward kernel.
#include "cuda/gram_launch.cuh"

namespace fastkd {
namespace {

template <typename A, Mode MODE, int MI>
void launch_one(const GramCall& call, const BackwardArguments& arguments, int64_t blocks) {
  launch("gram_backward", gram_backward<A, MODE, MI>, blocks, kGramThreads<MI>, backward_shared<A, MI>(), call.device, arguments);
}

template <Mode MODE>
void launch_mode(const GramCall& call, const BackwardArguments& arguments, int64_t blocks, bool wide) {
  wide ? launch_one<float, MODE, 4>(call, arguments, blocks) : launch_one<float, MODE, 2>(call, arguments, blocks);
}

void launch_backward(const GramCall& call, const BackwardArguments& arguments, int64_t blocks, bool wide) {
  if (call.accumulate == DType::kDouble) return launch_one<double, Mode::kIeee, 2>(call, arguments, blocks);
  if (call.mode == Mode::kIeee) return launch_one<float, Mode::kIeee, 2>(call, arguments, blocks);
  if (call.mode == Mode::kTf32) return launch_mode<Mode::kTf32>(call, arguments, blocks, wide);
  if (call.mode == Mode::kTf32x3) return launch_mode<Mode::kTf32x3>(call, arguments, blocks, wide);
  launch_mode<Mode::kBf16>(call, arguments, blocks, wide);
}

}  // namespace

void run_backward(GramCall& call, const std::vector<GradientArguments>& items, int64_t samples, double factor, const TensorView* upstream) {
  for (const bool now : {false, true}) {
    BackwardArguments arguments{};
    arguments.factor = factor;
    if (upstream) {
      arguments.upstream = upstream->data;
      arguments.upstream_dtype = upstream->dtype;
    }
    int64_t blocks = 0;
    const auto flush = [&] {
      if (arguments.items) launch_backward(call, arguments, blocks, now);
      arguments.items = 0;
      blocks = 0;
    };
    for (const GradientArguments& item : items) {
      const int64_t rows = item.out.channels, columns = item.out.positions;
      if (is_wide(call.mode, samples, rows, columns) != now) continue;
      if (arguments.items == BackwardArguments::kMost) flush();
      GradientArguments& planned = arguments.item[arguments.items++] = item;
      const int64_t tile = now ? 128 : 64;
      planned.row_tiles = static_cast<int32_t>(tiles_of(rows, tile));
      planned.column_tiles = static_cast<int32_t>(tiles_of(columns, tile));
      planned.first_block = static_cast<int32_t>(blocks);
      blocks += samples * planned.row_tiles * planned.column_tiles;
      grid_of("gram_backward", blocks);
    }
    flush();
  }
}

}  // namespace fastkd
