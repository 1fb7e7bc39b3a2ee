// How the FSP operators (fsp/fsp.cpp) are divided into units of work, and run: what fsp.h's structs hold is
// decided here.
#pragma once

#include "cpu/dispatch.h"
#include "cpu/few.h"
#include "cpu/fsp/fsp.h"
#include "cpu/host.h"

namespace fastkd {

// Owns the pooling tables that the plans point into.
struct Pools {
  std::vector<PoolTables> tables;
  PoolPlan make(const Feature& x, const int64_t* out, bool max) {
    PoolTables made = make_pool(x.size, out, max);
    const PoolPlan plan = made.plan;
    if (plan.active) tables.push_back(std::move(made));
    return plan;
  }
};

// Both maps of a pair as the pair sees them; returns the number of common positions.
int64_t join(const Feature& a, const Feature& b, bool max, Pools& pools, FspOperand& as_a, FspOperand& as_b);

// student and teacher: the features of both stages; teacher is null for a plain matrix. may_low_rank: not
// where the teacher's gradients are wanted (fsp/low_rank.inl).
FspPair plan_pair(const Feature* student, const Feature* teacher, bool max, FspResult result,
                  bool may_low_rank, Pools& pools);

// channel_dim: the dimension of m that holds the channels of the feature whose gradient this is; 3 -
// channel_dim holds the other's.
FspTerm plan_term(const FspOperand& other, const PoolPlan& own, int64_t positions, double upstream,
                  const TensorView& m, int channel_dim);

// The gradient of one feature, allocated here, with the terms already in `stage`.
Tensor plan_stage(FspStage& stage, const Tensor& x, DType accumulate);

// A forward pass, planned; the losses of its units.
struct ForwardPlan {
  FspForward call{};
  int64_t batch, work = 0;  // work: multiply-adds a sample
  std::vector<double> partial;

  ForwardPlan(const Few<FspPair>& pairs, int64_t samples) : batch(samples) {
    call.pairs = pairs.data();
    call.count = int64_t(pairs.size());
    for (const FspPair& pair : pairs) {
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

// The gradients of all stages, planned.
struct BackwardPlan {
  FspBackward call{};
  int64_t batch = 0, work = 0;

  explicit BackwardPlan(const Few<FspStage>& stages) {
    call.stages = stages.data();
    call.count = int64_t(stages.size());
    for (const FspStage& stage : stages) {
      batch = stage.x.batch;
      call.units_per_sample += stage.channel_blocks;
      for (int t = 0; t < stage.terms; ++t)
        work += stage.term[t].positions * stage.x.channels * stage.term[t].other.x.channels;
    }
  }
};

void run_forward(const ForwardPlan& plan, DType accumulate);
void run_backward(const BackwardPlan& plan, DType accumulate);

// Forward and backward. What a unit computes is the same either way: it is done sample by sample, so that the
// backward finds a sample's maps in the cache, where the samples divide well among the threads, else pass by
// pass.
void run_training(const ForwardPlan& forward, const BackwardPlan& backward, DType accumulate);

}  // namespace fastkd
