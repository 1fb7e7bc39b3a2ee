// What CUDA kernels are written with. Under nvcc these are thin names for what the GPU has; under a C++
// compiler (FASTKD_EMULATE, for the tests alone) emulate.h runs the same kernels on the CPU, so a kernel uses
// nothing that is not here:
//
//   FASTKD_KERNEL(threads) name(args)     a __global__ function for blocks of that many threads (a multiple
//                                         of 32)
//   FASTKD_KERNEL_OF(threads, blocks) ... the same, with as few registers as so many blocks on a
//                                         multiprocessor may have
//   FASTKD_DEVICE                         a function called by kernels
//   FASTKD_BOTH                           by the host too, and so by tests
//   FASTKD_MEMBER                         a function of a struct, called by kernels
//   FASTKD_ARGUMENTS(type) name           a kernel's struct of arguments, read where it is
//   threadIdx.x, blockIdx.x, gridDim.x    as ever; blocks and grids have one dimension
//   shared_memory()                       the block's dynamic shared memory, 16-byte aligned; there is no
//                                         static one
//   sync_block()                          all threads of the block must come
//   shuffle_xor(value, mask)              all 32 lanes must come
//   is_last(ticket, count)                whether the block is the last of `count` that take this ticket;
//                                         see below
//   load_fresh(pointer)                   a number that another block wrote before is_last() said so
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

#include "common/formulas.h"
#include "common/tensor.h"

#ifdef FASTKD_EMULATE
#include "cuda/testing/emulate.h"
#else
#include <cuda_runtime.h>
#define FASTKD_KERNEL(threads) __global__ void __launch_bounds__(threads)
#define FASTKD_KERNEL_OF(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define FASTKD_DEVICE static __device__ __forceinline__
#define FASTKD_BOTH static __host__ __device__ __forceinline__
#define FASTKD_MEMBER __device__ __forceinline__
#define FASTKD_ARGUMENTS(type) const __grid_constant__ type
#define FASTKD_UNROLL _Pragma("unroll")
#define FASTKD_ROLLED _Pragma("unroll 1")

namespace fastkd {

extern __shared__ uint4 fastkd_shared_memory[];
FASTKD_DEVICE unsigned char* shared_memory() {
  return reinterpret_cast<unsigned char*>(fastkd_shared_memory);
}
FASTKD_DEVICE void sync_block() { __syncthreads(); }
template <typename T>
FASTKD_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <typename T>
FASTKD_DEVICE T load_fresh(const T* pointer) {
  return __ldcg(pointer);
}

// Called by all threads of a block after they have written what other blocks are to read: true, for all of
// them, in the block that comes last of `count`. The ticket is 0 before the first and after the last. An
// integer counts, so that no sum depends on the order. Between the barriers one thread releases what all have
// written, and acquires what other blocks have: a fence in each thread would cost as much again.
FASTKD_DEVICE bool is_last(unsigned* ticket, unsigned count) {
  sync_block();
  int last = 0;
  if (threadIdx.x == 0) {
    unsigned before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(ticket) : "memory");
    last = before == count - 1;
    if (last) *ticket = 0;
  }
  return __syncthreads_or(last);
}

}  // namespace fastkd
#endif

namespace fastkd {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int kWarp = 32;

// 16 bytes of memory, as they are loaded and stored at once.
struct alignas(16) Pack {
  uint32_t word[4];
};
template <typename T>
constexpr int kPack = 16 / static_cast<int>(sizeof(T));

template <typename T>
FASTKD_DEVICE Pack load_pack(const T* pointer) {
#ifdef FASTKD_EMULATE
  return *reinterpret_cast<const Pack*>(emulate::aligned(pointer, 16));
#else
  const uint4 v = *reinterpret_cast<const uint4*>(pointer);
  return {{v.x, v.y, v.z, v.w}};
#endif
}

// Zeros, where `wanted` is false; not a branch, so that several are on their way at once. `once`: the
// second-level cache gives it up before anything else.
template <typename T>
FASTKD_DEVICE Pack load_pack_if(const T* pointer, bool wanted, bool once = false) {
#ifdef FASTKD_EMULATE
  (void)once;
  return wanted ? load_pack(pointer) : Pack{};
#else
  Pack v;
  uint64_t usual, first;
  asm("createpolicy.fractional.L2::evict_unchanged.b64 %0, 1.0;" : "=l"(usual));
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(first));
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;"
      " @p ld.global.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %6; }"
      : "=&r"(v.word[0]), "=&r"(v.word[1]), "=&r"(v.word[2]), "=&r"(v.word[3])
      : "l"(pointer), "r"(static_cast<int>(wanted)), "l"(once ? first : usual));
  return v;
#endif
}

template <typename T>
FASTKD_DEVICE void store_shared_pack(T* pointer, const Pack& pack) {
#ifdef FASTKD_EMULATE
  *reinterpret_cast<Pack*>(const_cast<void*>(emulate::aligned(pointer, 16))) = pack;
#else
  *reinterpret_cast<uint4*>(pointer) = make_uint4(pack.word[0], pack.word[1], pack.word[2], pack.word[3]);
#endif
}

// To global memory, in one instruction. nvcc splits a store that is written in C++ into four where it
// computes the words one by one.
template <typename T>
FASTKD_DEVICE void store_pack(T* pointer, const Pack& pack) {
#ifdef FASTKD_EMULATE
  store_shared_pack(pointer, pack);
#else
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(pointer), "r"(pack.word[0]),
               "r"(pack.word[1]), "r"(pack.word[2]), "r"(pack.word[3])
               : "memory");
#endif
}

// Number i of a pack. The indices are known when a loop is unrolled, so nothing leaves the registers.
template <typename T>
FASTKD_DEVICE T get(const Pack& pack, int i) {
  T value;
  if constexpr (sizeof(T) == 8) {
    const uint64_t bits = static_cast<uint64_t>(pack.word[2 * i + 1]) << 32 | pack.word[2 * i];
    memcpy(&value, &bits, 8);
  } else if constexpr (sizeof(T) == 4) {
    memcpy(&value, &pack.word[i], 4);
  } else {
    const uint16_t bits = static_cast<uint16_t>(pack.word[i / 2] >> (16 * (i % 2)));
    memcpy(&value, &bits, 2);
  }
  return value;
}

template <typename T>
FASTKD_DEVICE void set(Pack& pack, int i, T value) {
  if constexpr (sizeof(T) == 8) {
    uint64_t bits;
    memcpy(&bits, &value, 8);
    pack.word[2 * i] = static_cast<uint32_t>(bits);
    pack.word[2 * i + 1] = static_cast<uint32_t>(bits >> 32);
  } else if constexpr (sizeof(T) == 4) {
    memcpy(&pack.word[i], &value, 4);
  } else {
    uint16_t bits;
    memcpy(&bits, &value, 2);
    const int shift = 16 * (i % 2);
    pack.word[i / 2] = (pack.word[i / 2] & ~(0xffffu << shift)) | static_cast<uint32_t>(bits) << shift;
  }
}

// The sum of `value` over the threads of a block (a multiple of 32, at most 1024), for all of them and in one
// order. `scratch` holds 32 numbers of shared memory, and may be used again after a sync_block().
template <typename A>
FASTKD_DEVICE A block_sum(A value, A* scratch, int threads) {
  FASTKD_UNROLL
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  sync_block();
  A total = 0;
  for (int w = 0; w < threads / kWarp; ++w) total += scratch[w];
  return total;
}

}  // namespace fastkd
