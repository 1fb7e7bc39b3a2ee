// The attention-transfer loss over a list of stages, in one launch: each block sums the powers of one unit
// of one side, stage and sample; the last of a (stage, sample) normalizes both maps, compares them and writes
// the coefficients that the backward pass streams; the last of these adds up the loss. Integer tickets choose
// who is last, so no sum depends on the order.
#pragma once

#include "cuda/attention/power_sum.cuh"
#include "cuda/attention/norm.cuh"

namespace fastkd {

constexpr int kMaxStages = 16;

struct LossSide {
  Place x;
  MatrixView view;
  int64_t sums_at;     // in args.sums: view.parts * positions numbers a sample
  void* coefficients;  // (N, positions), or null if not wanted
};

struct LossStage {
  LossSide student, teacher;
  double factor;  // of the stage's summed squares (or distances) in the loss
  int32_t positions;
  int32_t first;  // block
};

struct LossArgs {
  LossStage stages[kMaxStages];
  double* terms;  // of the loss, [stage][sample]
  void* sums;
  void* loss;
  unsigned* tickets;  // one for all, then [stage][sample]
  double eps;
  int32_t count, samples;
  int8_t mean, add_eps, l2, student_is_map, teacher_is_map;
};
static_assert(sizeof(LossArgs) <= 4096, "a kernel takes 4096 bytes of arguments at most");

// Blocks of a sample. Maps are read by the block that compares them, so two maps are a unit without power
// sums.
FASTKD_BOTH int32_t units_of(const LossStage& stage, bool student_is_map, bool teacher_is_map) {
  const int32_t units =
      (student_is_map ? 0 : stage.student.view.units) + (teacher_is_map ? 0 : stage.teacher.view.units);
  return units > 0 ? units : 1;
}

// Writes this thread's numbers of a side's map, before normalization, to y, and returns the sum of their
// squares.
template <typename A>
FASTKD_DEVICE double read_map(const LossSide& side, bool is_map, const A* sums, int64_t n, int32_t positions,
                              A* y) {
  if (!is_map) return collapse(sums, side.view.parts, positions, y);
  double squares = 0;
  for (int32_t s = threadIdx.x; s < positions; s += kThreads) {
    const A number = load_number<A>(side.x.data, side.view.dtype,
                                    n * side.x.stride_n + spatial_offset(side.view.size, side.x.stride, s));
    y[s] = number;
    squares += static_cast<double>(number) * number;
  }
  return squares;
}

// Both maps of a sample, their distance and coefficients. Each thread has the positions s = its index and
// every kThreads on, in all three passes, so that what it writes of a map is read by itself alone.
template <typename A>
FASTKD_DEVICE double compare(const LossArgs& args, const LossStage& stage, int64_t n) {
  const LossSide& student = stage.student;
  const LossSide& teacher = stage.teacher;
  const bool s_map = args.student_is_map, t_map = args.teacher_is_map;
  const int32_t positions = stage.positions;
  A* s_sums = static_cast<A*>(args.sums) + student.sums_at + n * student.view.parts * positions;
  A* t_sums = static_cast<A*>(args.sums) + teacher.sums_at + n * teacher.view.parts * positions;
  const bool fits = 2 * positions <= kTile;
  A* y_s = fits ? shared_numbers<A>() : s_sums;
  A* y_t = fits ? y_s + positions : t_sums;

  double squares[2] = {read_map(student, s_map, s_sums, n, positions, y_s),
                       read_map(teacher, t_map, t_sums, n, positions, y_t)};
  block_sums(squares, 0);
  const double s_share = reduction_of(student.view, args.mean),
               t_share = reduction_of(teacher.view, args.mean);
  const Norm s_norm =
      s_map ? no_norm(1) : norm_from(sqrt(squares[0]) / s_share, s_share, args.eps, args.add_eps);
  const Norm t_norm =
      t_map ? no_norm(1) : norm_from(sqrt(squares[1]) / t_share, t_share, args.eps, args.add_eps);

  double sums[3] = {};  // of the squared difference, and of the difference along each map
  for (int32_t s = threadIdx.x; s < positions; s += kThreads) {
    const A a = normalized(y_s[s], s_norm), b = normalized(y_t[s], t_norm);
    y_s[s] = a;
    y_t[s] = b;
    const double d = static_cast<double>(a) - static_cast<double>(b);
    sums[0] += d * d;
    sums[1] += d * a;
    sums[2] += d * b;
  }
  block_sums(sums, 1);
  const double distance = args.l2 ? sqrt(sums[0]) : sums[0];
  double slope = 2 * stage.factor;
  if (args.l2) slope = distance == 0 ? 0 : stage.factor / distance;

  A* s_out = static_cast<A*>(student.coefficients);
  A* t_out = static_cast<A*>(teacher.coefficients);
  if (s_out == nullptr && t_out == nullptr) return distance;
  const double s_factor = s_map ? slope : slope * 2 / s_share,
               t_factor = t_map ? -slope : -slope * 2 / t_share;
  for (int32_t s = threadIdx.x; s < positions; s += kThreads) {
    const double a = y_s[s], b = y_t[s], d = a - b;
    if (s_out != nullptr)
      s_out[n * positions + s] = static_cast<A>(along_gradient(d, a, sums[1], s_norm, s_factor));
    if (t_out != nullptr)
      t_out[n * positions + s] = static_cast<A>(along_gradient(d, b, sums[2], t_norm, t_factor));
  }
  return distance;
}

template <typename A>
FASTKD_KERNEL_OF(kThreads, kBlocks<A>)
loss_kernel(const LossArgs args) {
  int32_t i = 0;
  while (i + 1 < args.count && static_cast<int32_t>(blockIdx.x) >= args.stages[i + 1].first) ++i;
  const LossStage& stage = args.stages[i];
  const int32_t units = units_of(stage, args.student_is_map, args.teacher_is_map);
  const int32_t local = static_cast<int32_t>(blockIdx.x) - stage.first;
  const int32_t sample = quotient_down(local, units), unit = local - sample * units;
  const int32_t s_units = args.student_is_map ? 0 : stage.student.view.units;
  const bool is_student = unit < s_units;
  if (!(is_student ? args.student_is_map : args.teacher_is_map)) {
    const LossSide& side = is_student ? stage.student : stage.teacher;
    A* out = static_cast<A*>(args.sums) + side.sums_at +
             static_cast<int64_t>(sample) * side.view.parts * stage.positions;
    power_sums<false, true>(side.view, side.x, nullptr, sample, unit - (is_student ? 0 : s_units),
                            shared_numbers<A>(), out);
  }
  const int64_t at = static_cast<int64_t>(i) * args.samples + sample;
  if (!is_last(args.tickets + 1 + at, static_cast<unsigned>(units))) return;

  const double distance = compare<A>(args, stage, sample);
  if (threadIdx.x == 0) args.terms[at] = stage.factor * distance;
  if (!is_last(args.tickets, static_cast<unsigned>(args.count * args.samples))) return;

  double total[1] = {};
  for (int32_t k = threadIdx.x; k < args.count * args.samples; k += kThreads)
    total[0] += load_fresh(args.terms + k);
  block_sums(total, 2);
  if (threadIdx.x == 0) *static_cast<A*>(args.loss) = static_cast<A>(total[0]);
}

}  // namespace fastkd
