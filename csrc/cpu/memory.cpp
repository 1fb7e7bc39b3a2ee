#include "cpu/memory.h"

#include <atomic>
#include <chrono>
#include <ctime>
#include <mutex>
#include <vector>

#include "cpu/attention/attention.h"
#include "cpu/dispatch.h"

namespace fastkd {
namespace {

struct Plan {
  int32_t planes, streams;
};

// What is taken unless another way is faster by more than what chance makes of a busy machine.
constexpr Plan kUsual = {8, 1};
constexpr double kClearly = 0.9;

// The features of the measurement: 16 MiB each, as of a wide network on CIFAR, three of which fill most
// caches.
constexpr int64_t kBatch = 128, kChannels = 32, kSide = 32, kRounds = 4;

void set_planes(int32_t planes) { __atomic_store_n(&planes_side_by_side, planes, __ATOMIC_RELAXED); }

// Seconds that this thread has worked. Work of other processes does not count where the system can tell.
double thread_seconds() {
#ifdef CLOCK_THREAD_CPUTIME_ID
  timespec now;
  if (clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now) == 0)
    return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
#endif
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

Feature feature_at(float* data) {
  constexpr int64_t kPositions = kSide * kSide;
  return {data,      DType::kFloat,     Layout::kPlanes,        kBatch,
          kChannels, kPositions,        kChannels * kPositions, kPositions,
          1,         {1, kSide, kSide}, {kPositions, kSide, 1}};
}

// The attention-transfer loss of one stage in the ways there are, in turns; the least time of each counts.
// The way of writing and that of reading are chosen apart.
Plan measured() {
  constexpr int64_t kValues = kBatch * kChannels * kSide * kSide;
  std::vector<float> data(3 * kValues, 0.5f), coefficients(kBatch * kSide * kSide);
  std::vector<double> partial(kBatch);
  const int64_t size[3] = {1, kSide, kSide};
  const PoolTables pool = make_pool(size, size, false);
  AttentionStage stage;
  const Feature student = feature_at(data.data()), teacher = feature_at(data.data() + kValues);
  stage.student = {student, pool.plan, kChannels, coefficients.data()};
  stage.teacher = {teacher, pool.plan, kChannels, nullptr};
  float* const gradient = data.data() + 2 * kValues;
  stage.gradient = feature_at(gradient);
  stage.factor = 1;
  AttentionLossArgs args;
  args.stages = &stage;
  args.stage_count = 1;
  args.options = {2, 1e-12, 0, 1, 0};
  args.accumulation = DType::kFloat;
  args.pool_before = args.l2 = args.student_is_map = args.teacher_is_map = 0;
  args.upstream = 1;
  args.partial = partial.data();
  Scratch scratch(16 * scratch_piece(kSide * kSide, sizeof(double)));

  // Seconds of the loss with its gradient, and of its sums over channels alone.
  const auto seconds_of = [&](Plan plan, bool with_gradient) {
    set_planes(plan.planes);
    stage.streaming = plan.streams;
    stage.gradient.data = with_gradient ? gradient : nullptr;
    const double begun = thread_seconds();
    kernels().attention.loss(args, 0, kBatch, scratch.data());
    return thread_seconds() - begun;
  };
  constexpr Plan kPlans[] = {kUsual, {8, 0}, {1, 1}, {2, 1}};
  constexpr int kStores = 2;  // of them differ in how they write; the others in how they read
  double least[4], usual_read = 0;
  for (int64_t round = 0; round < kRounds; ++round) {
    const auto keep = [&](double seconds, double& best) {
      if (round == 0 || seconds < best) best = seconds;
    };
    for (int i = 0; i < 4; ++i) keep(seconds_of(kPlans[i], i < kStores), least[i]);
    keep(seconds_of(kUsual, false), usual_read);
  }
  Plan best = kUsual;
  if (least[1] < kClearly * least[0]) best.streams = 0;
  double shortest = kClearly * usual_read;
  for (int i = kStores; i < 4; ++i) {
    if (least[i] < shortest) {
      shortest = least[i];
      best.planes = kPlans[i].planes;
    }
  }
  return best;
}

// The plan as one number, so that threads see all of it or nothing: 0 until there is one.
std::atomic<int32_t>& chosen() {
  static std::atomic<int32_t> plan{0};
  return plan;
}

int32_t plan_of_this_process() {
  int32_t plan = chosen().load(std::memory_order_acquire);
  if (plan == 0) {
    static std::mutex measuring;
    const std::lock_guard<std::mutex> lock(measuring);
    plan = chosen().load(std::memory_order_acquire);
    if (plan == 0) {
      const Plan found = measured();
      set_planes(found.planes);
      plan = found.planes * 2 + found.streams;
      chosen().store(plan, std::memory_order_release);
    }
  }
  return plan;
}

}  // namespace

int32_t planes_side_by_side = 8;

void plan_memory(int64_t bytes) {
  if (bytes >= kStreamingBytes) plan_of_this_process();
}

bool streams_past_caches(int64_t bytes) {
  return bytes >= kStreamingBytes && plan_of_this_process() % 2 == 1;
}

}  // namespace fastkd

// For ctypes. The plan in use, measured now if it was not yet: twice the planes, plus 1 if large gradients
// are written past the caches.
extern "C" __attribute__((visibility("default"))) int fastkd_memory_plan() {
  return fastkd::plan_of_this_process();
}

// Chooses the plan for all threads; 0 lets a measurement choose. Returns whether there is such a plan.
extern "C" __attribute__((visibility("default"))) int fastkd_set_memory_plan(int plan) {
  const int32_t planes = plan / 2;
  if (plan != 0 && (plan < 0 || (planes != 1 && planes != 2 && planes != 8))) return 0;
  if (plan != 0) fastkd::set_planes(planes);
  fastkd::chosen().store(plan, std::memory_order_release);
  return 1;
}
