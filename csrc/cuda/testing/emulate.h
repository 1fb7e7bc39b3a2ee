// A GPU for tests: the kernels of csrc/cuda, compiled as C++ with FASTKD_EMULATE, run on the CPU. Blocks run
// one after the other, the threads of a block as fibers that change at barriers and shuffles. It finds wrong
// results, barriers that not all threads reach, accesses that are not aligned, shared memory that is not
// initialized (it is filled with NaN) or too large, and, since tests run the threads and blocks in both
// orders, missing barriers. It does not find what depends on a GPU's memory model; compute-sanitizer is for
// that.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>

#define FASTKD_KERNEL(threads) static void
#define FASTKD_KERNEL_OF(threads, blocks) static void
#define FASTKD_DEVICE static inline
#define FASTKD_BOTH static inline
#define FASTKD_MEMBER inline
#define FASTKD_ARGUMENTS(type) const type&
#define FASTKD_UNROLL
#define FASTKD_ROLLED
#define __restrict__

namespace fastkd {
namespace emulate {

struct Index {
  unsigned x;
};

extern Index thread_index, block_index, block_size, grid_size;

// Runs body() in every thread of every block. Throws std::runtime_error where a GPU would hang, or refuse.
void run(const char* name, unsigned blocks, unsigned threads, size_t shared_bytes,
         const std::function<void()>& body);

unsigned char* shared();
void barrier(bool whole_block);
// Every lane's `size` bytes (at most 256) to every lane of the warp: the result holds 32 times those, valid
// until the next exchange but one.
const unsigned char* exchange(const void* mine, size_t size);
// The stream of calls, and whether a graph is captured on it, as a test has set them.
void* stream();
bool is_capturing();
// Which slice of tickets a call has; 64 and more: of a captured call, where its first counter is; -1: memory
// of its own.
void note_tickets(int slice);
// The sum of `sum` and eight products, as a tensor core adds them. It cuts off each what lies more than two
// bits below the largest one's last place in float32, and off the result what lies below its own. It rounds
// nothing to nearest.
float add_cut_off(float sum, const double (&products)[8]);
// Called for each product of a warp on tensor cores.
void count_product();
// The pointer; throws unless it is a multiple of `bytes`.
const void* aligned(const void* pointer, uintptr_t bytes);

}  // namespace emulate

#define threadIdx ::fastkd::emulate::thread_index
#define blockIdx ::fastkd::emulate::block_index
#define blockDim ::fastkd::emulate::block_size
#define gridDim ::fastkd::emulate::grid_size

static inline unsigned char* shared_memory() { return emulate::shared(); }
static inline void sync_block() { emulate::barrier(true); }

template <typename T>
static inline T shuffle_xor(T value, int mask) {
  T other;
  const unsigned lane = (threadIdx.x % 32) ^ static_cast<unsigned>(mask);
  std::memcpy(&other, emulate::exchange(&value, sizeof value) + lane * sizeof value, sizeof other);
  return other;
}

template <typename T>
static inline T load_fresh(const T* pointer) {
  return *pointer;
}

static inline bool is_last(unsigned* ticket, unsigned count) {
  sync_block();
  if (threadIdx.x == 0) ++*ticket;
  sync_block();
  const bool last = *ticket == count;
  sync_block();
  if (last && threadIdx.x == 0) *ticket = 0;
  sync_block();
  return last;
}

}  // namespace fastkd
