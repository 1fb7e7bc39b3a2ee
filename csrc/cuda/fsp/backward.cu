// Launches of the backward kernel.
#include "cuda/fsp/plan.cuh"

namespace fastkd {
namespace {

template <typename A, Mode MODE>
void launch_one(const FspCall& call, const BackwardArguments& arguments, int64_t blocks) {
  launch("fsp_backward", fsp_backward<A, MODE>, blocks, kFspThreads, backward_shared<A>(), call.device,
         arguments);
}

void launch_backward(const FspCall& call, const BackwardArguments& arguments, int64_t blocks) {
  if (call.accumulate == DType::kDouble) return launch_one<double, Mode::kIeee>(call, arguments, blocks);
  if (call.mode == Mode::kIeee) return launch_one<float, Mode::kIeee>(call, arguments, blocks);
  if (call.mode == Mode::kTf32) return launch_one<float, Mode::kTf32>(call, arguments, blocks);
  if (call.mode == Mode::kTf32x3) return launch_one<float, Mode::kTf32x3>(call, arguments, blocks);
  launch_one<float, Mode::kBf16>(call, arguments, blocks);
}

}  // namespace

void run_backward(FspCall& call, const std::vector<GradientArguments>& items, int64_t samples, double factor,
                  const TensorView* upstream) {
  BackwardArguments arguments{};
  arguments.factor = factor;
  if (upstream) {
    arguments.upstream.data = upstream->data;
    arguments.upstream.dtype = upstream->dtype;
  }
  int64_t blocks = 0;
  const auto flush = [&] {
    if (arguments.items) launch_backward(call, arguments, blocks);
    arguments.items = 0;
    blocks = 0;
  };
  for (const GradientArguments& item : items) {
    if (arguments.items == BackwardArguments::kMost) flush();
    GradientArguments& planned = arguments.item[arguments.items++] = item;
    planned.row_tiles = tiles_of(item.out.channels);
    planned.column_tiles = tiles_of(item.out.positions);
    planned.first_block = static_cast<int32_t>(blocks);
    blocks += samples * planned.row_tiles * planned.column_tiles;
    grid_of("fsp_backward", blocks);
  }
  flush();
}

}  // namespace fastkd
