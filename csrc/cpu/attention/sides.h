// What the operators over attention maps share on the host side.
#pragma once

#include "common/attention_arguments.h"
#include "cpu/attention/attention.h"
#include "cpu/host.h"

namespace fastkd {

// A feature as the kernels read it.
AttentionSide side_of(const Feature& x, const PoolPlan& pool);
// Scratch memory that a side needs: `maps` maps of its positions, and for the chunks if it is not read in
// place.
size_t scratch_of(const AttentionSide& side, int64_t maps, bool in_place, DType accumulation);
// Checks grad, map and norm against x and each other; `out` is x's gradient, to be written.
AttentionMapBackwardArgs map_backward_args(const Tensor& grad, const TensorView& x, const Tensor& map,
                                           const Tensor& norm, const AttentionOptions& options,
                                           bool normalize, const Tensor& out);

}  // namespace fastkd
