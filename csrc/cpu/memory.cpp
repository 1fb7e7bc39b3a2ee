#include "cpu/memory.h"

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

#include <atomic>
#include <chrono>
#include <ctime>
#include <mutex>
#include <vector>

#include "cpu/attention/attention.h"
#include "cpu/dispatch.h"
#include "cpu/host.h"

namespace fastkd {
namespace {

// Streaming stores are taken unless ordinary ones are faster by more than the times of a busy machine vary.
constexpr double kClearly = 0.9;

// The features of the measurement: 16 MiB each, as of a wide network on CIFAR, three of which fill most
// caches.
constexpr int64_t kBatch = 128, kChannels = 32, kSide = 32, kRounds = 4;

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

// Whether streaming stores are taken: the attention-transfer loss of one stage with its gradient, in both
// ways in turns; the least time of each counts.
bool measured() {
  constexpr int64_t kValues = kBatch * kChannels * kSide * kSide;
  std::vector<float> data(3 * kValues, 0.5f), coefficients(kBatch * kSide * kSide);
  std::vector<double> partial(kBatch);
  const int64_t size[3] = {1, kSide, kSide};
  const PoolTables pool = make_pool(size, size, false);
  AttentionStage stage;
  const Feature student = feature_at(data.data()), teacher = feature_at(data.data() + kValues);
  stage.student = {student, pool.plan, kChannels, coefficients.data()};
  stage.teacher = {teacher, pool.plan, kChannels, nullptr};
  stage.gradient = feature_at(data.data() + 2 * kValues);
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

  double least[2];
  for (int64_t round = 0; round < kRounds; ++round) {
    for (int streams = 0; streams < 2; ++streams) {
      stage.streaming = streams;
      const double begun = thread_seconds();
      kernels().attention.loss(args, 0, kBatch, scratch.data());
      const double seconds = thread_seconds() - begun;
      if (round == 0 || seconds < least[streams]) least[streams] = seconds;
    }
  }
  return least[0] >= kClearly * least[1];
}

// 0 until there is a choice, then 1 for ordinary stores and 2 for streaming ones.
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
      plan = measured() ? 2 : 1;
      chosen().store(plan, std::memory_order_release);
    }
  }
  return plan;
}

// Bytes of the second-level cache; a usual size where the system does not tell.
int64_t second_level_cache() {
  static const int64_t bytes = [] {
    long found = 0;
#ifdef _SC_LEVEL2_CACHE_SIZE
    found = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return found > 0 ? int64_t{found} : int64_t{1} << 20;
  }();
  return bytes;
}

enum AheadPlan : int32_t { kFitting, kNever, kAlways };
std::atomic<int32_t>& ahead_plan() {
  static std::atomic<int32_t> plan{kFitting};
  return plan;
}

}  // namespace

bool streams_past_caches(int64_t bytes) { return bytes >= kStreamingBytes && plan_of_this_process() == 2; }

bool asks_ahead(int64_t bytes) {
  const int32_t plan = ahead_plan().load(std::memory_order_relaxed);
  // Two samples may exceed the cache by a quarter: a teacher's maps are not read again after the loss.
  return plan == kFitting ? 8 * bytes <= 5 * second_level_cache() : plan == kAlways;
}

}  // namespace fastkd

// For ctypes. The way in use, measured now if it was not yet: 1 in the caches, 2 past them.
extern "C" __attribute__((visibility("default"))) int fastkd_memory_plan() {
  return fastkd::plan_of_this_process();
}

// Chooses the way for all threads; 0 lets a measurement choose.
extern "C" __attribute__((visibility("default"))) void fastkd_set_memory_plan(int plan) {
  fastkd::chosen().store(plan, std::memory_order_release);
}

// When maps are asked for ahead: 0 where two samples fit into the second-level cache, 1 never, 2 always.
extern "C" __attribute__((visibility("default"))) int fastkd_ahead_plan() {
  return fastkd::ahead_plan().load(std::memory_order_relaxed);
}
extern "C" __attribute__((visibility("default"))) void fastkd_set_ahead_plan(int plan) {
  fastkd::ahead_plan().store(plan, std::memory_order_relaxed);
}

extern "C" __attribute__((visibility("default"))) int fastkd_second_level_cache() {
  return static_cast<int>(fastkd::second_level_cache());
}
