// Empty in every build but the tests' (see emulate.h).
#ifdef FASTKD_EMULATE
#include "cuda/testing/emulate.h"

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace fastkd {
namespace emulate {

Index thread_index{0}, block_index{0}, block_size{0}, grid_size{0};

namespace {

constexpr size_t kStackBytes = size_t{256} << 10;
constexpr size_t kSharedLimit = 227 << 10;  // of a block on sm_90
constexpr size_t kLanes = 32, kExchangeBytes = 256;

enum class State { kReady, kAtWarp, kAtBlock, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state;
  unsigned exchanges;  // so far
};

struct Warp {
  alignas(16) unsigned char slots[2][kLanes * kExchangeBytes];
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
std::vector<unsigned char> memory;
const std::function<void()>* current_body = nullptr;
std::string failure;  // of a thread: exceptions must not leave a fiber
ucontext_t scheduler;
bool reversed = false;
bool idle = false;
std::string launched;
void* stream_of_calls = nullptr;
bool capturing = false;
int slice_of_tickets = -1;
int64_t products = 0;

void enter() {
  try {
    (*current_body)();
  } catch (const std::exception& error) {
    failure = error.what();
  }
  fibers[thread_index.x].state = State::kDone;
  swapcontext(&fibers[thread_index.x].context, &scheduler);
}

void wait(State state) {
  Fiber& fiber = fibers[thread_index.x];
  fiber.state = state;
  swapcontext(&fiber.context, &scheduler);
}

// Lets those go on whose barrier all others have reached; whether there were any.
bool release() {
  bool any = false;
  for (size_t first = 0; first < block_size.x; first += kLanes) {
    bool all = true;
    for (size_t i = first; i < first + kLanes; ++i) all = all && fibers[i].state == State::kAtWarp;
    for (size_t i = first; all && i < first + kLanes; ++i) fibers[i].state = State::kReady;
    any = any || all;
  }
  bool all = true, waiting = false;
  for (size_t i = 0; i < block_size.x; ++i) {
    all = all && (fibers[i].state == State::kAtBlock || fibers[i].state == State::kDone);
    waiting = waiting || fibers[i].state == State::kAtBlock;
  }
  for (size_t i = 0; all && i < block_size.x; ++i) {
    if (fibers[i].state == State::kAtBlock) fibers[i].state = State::kReady;
  }
  return any || (all && waiting);
}

void run_block(const std::string& name) {
  std::memset(memory.data(), 0xff, memory.size());
  for (unsigned i = 0; i < block_size.x; ++i) {
    Fiber& fiber = fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
    fiber.state = State::kReady;
    fiber.exchanges = 0;
  }
  for (unsigned done = 0; done < block_size.x;) {
    bool ran = false;
    for (unsigned k = 0; k < block_size.x; ++k) {
      thread_index.x = reversed ? block_size.x - 1 - k : k;
      if (fibers[thread_index.x].state != State::kReady) continue;
      ran = true;
      swapcontext(&scheduler, &fibers[thread_index.x].context);
      if (fibers[thread_index.x].state == State::kDone) ++done;
      if (!failure.empty()) throw std::runtime_error(name + ": " + failure);
    }
    if (!ran && !release())
      throw std::runtime_error(name + ": a barrier is not reached by all threads of its warp or block");
  }
}

}  // namespace

void run(const char* name, unsigned blocks, unsigned threads, size_t shared_bytes,
         const std::function<void()>& body) {
  const auto check = [&](bool holds, const char* what) {
    if (!holds) throw std::runtime_error(std::string(name) + ": " + what);
  };
  check(current_body == nullptr, "a kernel was launched by a kernel");
  check(blocks > 0 && blocks <= 0x7fffffffu, "the grid is empty or too large");
  check(threads > 0 && threads <= 1024 && threads % kLanes == 0, "the block is not of 1 to 32 whole warps");
  check(shared_bytes <= kSharedLimit, "more shared memory than a block may have");
  launched += (launched.empty() ? "" : " ") + std::string(name);
  if (idle) return;
  while (fibers.size() < threads) fibers.emplace_back();
  warps.resize(fibers.size() / kLanes);
  memory.resize(shared_bytes + 16);
  current_body = &body;
  block_size.x = threads;
  grid_size.x = blocks;
  failure.clear();
  const struct End {
    ~End() { current_body = nullptr; }
  } end;
  for (unsigned b = 0; b < blocks; ++b) {
    block_index.x = reversed ? blocks - 1 - b : b;
    run_block(name);
  }
}

unsigned char* shared() {
  const uintptr_t at = reinterpret_cast<uintptr_t>(memory.data());
  return memory.data() + ((16 - at % 16) % 16);
}

void barrier(bool whole_block) { wait(whole_block ? State::kAtBlock : State::kAtWarp); }

const unsigned char* exchange(const void* mine, size_t size) {
  if (size > kExchangeBytes) throw std::runtime_error("an exchange of too many bytes");
  // two buffers in turn: who comes to the next exchange early must not overwrite what others still read
  unsigned char* slots = warps[thread_index.x / kLanes].slots[fibers[thread_index.x].exchanges++ % 2];
  std::memcpy(slots + thread_index.x % kLanes * size, mine, size);
  barrier(false);
  return slots;
}

void* stream() { return stream_of_calls; }
bool is_capturing() { return capturing; }
void count_product() { ++products; }
void note_tickets(int slice) { slice_of_tickets = slice; }

float add_cut_off(float sum, const double (&products)[8]) {
  const auto exponent = [](double x) {
    uint64_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return static_cast<int>(bits >> 52 & 0x7ff);
  };
  constexpr int kZero = 0, kNotFinite = 0x7ff, kOne = 0x3ff, kBits = 23 + 2;
  int largest = exponent(sum);
  for (const double product : products) largest = std::max(largest, exponent(product));
  if (largest == kZero) return sum;
  if (largest == kNotFinite) {
    for (const double product : products) sum += static_cast<float>(product);
    return sum;
  }
  const int unit = largest - kOne - kBits;
  const double scale = std::ldexp(1.0, -unit);
  int64_t total = static_cast<int64_t>(sum * scale), place = 1;
  for (const double product : products) total += static_cast<int64_t>(product * scale);
  while (std::abs(total) / place >= 1 << 24) place *= 2;
  return static_cast<float>(std::ldexp(static_cast<double>(total / place * place), unit));
}

const void* aligned(const void* pointer, uintptr_t bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) throw std::runtime_error("an access is not aligned");
  return pointer;
}

}  // namespace emulate
}  // namespace fastkd

// For ctypes: the names of the kernels launched since it was last asked.
extern "C" __attribute__((visibility("default"))) const char* fastkd_emulate_launched() {
  static std::string told;
  told.swap(fastkd::emulate::launched);
  fastkd::emulate::launched.clear();
  return told.c_str();
}

// For ctypes: the stream of the calls that follow, and whether a graph is captured on it.
extern "C" __attribute__((visibility("default"))) void fastkd_emulate_stream(void* handle, int capturing) {
  fastkd::emulate::stream_of_calls = handle;
  fastkd::emulate::capturing = capturing != 0;
}

// For ctypes: what note_tickets() was told last.
extern "C" __attribute__((visibility("default"))) int fastkd_emulate_tickets() {
  return fastkd::emulate::slice_of_tickets;
}

// For ctypes: how often warps multiplied on tensor cores since it was last asked.
extern "C" __attribute__((visibility("default"))) int64_t fastkd_emulate_products() {
  const int64_t told = fastkd::emulate::products;
  fastkd::emulate::products = 0;
  return told;
}

// For ctypes: launches are checked and then do nothing, so that what the host does can be timed.
extern "C" __attribute__((visibility("default"))) void fastkd_emulate_idle(int wanted) {
  fastkd::emulate::idle = wanted != 0;
}

// For ctypes: threads and blocks run from the last to the first.
extern "C" __attribute__((visibility("default"))) void fastkd_emulate_reversed(int wanted) {
  fastkd::emulate::reversed = wanted != 0;
}
#endif
