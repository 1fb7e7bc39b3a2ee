// How the FSP operators are divided into launches: what kernels get of features, and which features are
// pooled before.
#pragma once

#include <vector>

#include "common/fsp_options.h"
#include "cuda/fsp/backward.cuh"
#include "cuda/fsp/forward.cuh"

namespace fastkd {

// The options of a call, and the tensors that it makes on the way.
class FspCall {
 public:
  FspCall(const TensorView& first, DType accumulate, Mode mode, bool max)
      : device(first), accumulate(accumulate), mode(mode), max(max), first_(first) {}

  // `x` on a grid: as it is, or pooled where it is read. If more than two tiles read it, it is pooled before
  // by pool(), which does so for all: one pass that reads a window's numbers and writes one, instead of
  // reading the window for each tile.
  Operand operand(const Feature& x, const int64_t* grid, int64_t channels_of_other);
  // `x` on a finer grid that was averaged to its size: its numbers spread over their windows.
  Operand spread(const Feature& x, const int64_t* grid) const;
  // dloss/dG: own channels x other channels.
  Operand matrix(const TensorView& m, int own_dim) const;
  void pool();

  // Tensors that live until the kernels are launched.
  void* keep(Tensor tensor) {
    held_.push_back(std::move(tensor));
    return held_.back().mutable_data_ptr();
  }
  // All features of a call: one device, batch size and number of dimensions.
  void check_feature(const TensorView& view, const char* name) const;
  void check_device_of(const TensorView& view, const char* name) const { check_device(view, first_, name); }

  const OnDevice device;
  const DType accumulate;
  const Mode mode;
  const bool max;

 private:
  TensorView first_;
  std::vector<PoolItem> pools_;
  std::vector<Tensor> held_;
};

Mode mode_of(const std::vector<TensorView>& features, DType accumulate, FspPrecision precision);
void common_size(const Feature& a, const Feature& b, int64_t* size);
inline bool is_size(const Feature& x, const int64_t* size) {
  return x.size[0] == size[0] && x.size[1] == size[1] && x.size[2] == size[2];
}
bool is_near(const Feature& x, const int64_t* grid);
// The windows of `x` where `fine` is whole times `coarse` and they are served; else a count of 0.
Whole whole_windows(const Operand& x, const int32_t* fine, const int32_t* coarse, bool spread);
inline int64_t count_of(const int64_t* size) { return size[0] * size[1] * size[2]; }
inline int32_t tiles_of(int64_t size) { return static_cast<int32_t>((size + kFspTile - 1) / kFspTile); }
// Operand of a tensor of this layout, unpooled, and how it is best read.
Operand plain_operand(const Feature& x);

// Run what is planned; tiles and blocks are counted here. `loss`: see ForwardArguments.
void run_forward(FspCall& call, std::vector<PairArguments> pairs, int64_t samples, FspResult result,
                 void* loss);
void run_backward(FspCall& call, const std::vector<GradientArguments>& items, int64_t samples, double factor,
                  const TensorView* upstream);

}  // namespace fastkd
