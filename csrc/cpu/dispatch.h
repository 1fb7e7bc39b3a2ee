// The table of kernels of one CPU code path, and the choice among the paths.
#pragma once

#include "cpu/attention/attention.h"
#include "cpu/fsp/fsp.h"
#include "cpu/batch_norm/batch_norm.h"
#include "cpu/crd/crd.h"
#include "cpu/difference/difference.h"
#include "cpu/pooled/pooled.h"
#include "cpu/rkd/rkd.h"
#include "cpu/sakd/sakd.h"
#include "cpu/attention/tap.h"

namespace fastkd {

// Code paths with AVX exist on x86-64, for GCC and for clang from 16 on. AMX is asked of Linux.
#if defined(__x86_64__) && defined(__GNUC__) && (!defined(__clang__) || __clang_major__ >= 16)
#define FASTKD_X86 1
#if defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#define FASTKD_AMX 1
#endif
#endif

// The path "neon" exists on aarch64.
#if defined(__aarch64__) && defined(__GNUC__) && !defined(__AARCH64EB__)
#define FASTKD_ARM 1
#endif

struct KernelTable {
  const char* name;  // "portable", "neon", "avx2", "avx512"
  const AttentionKernels& attention;
  const FspKernels& fsp;
  const TapKernels& tap;
  const NormKernels& norm;
  const RkdKernels& rkd;
  const DifferenceKernels& difference;
  const CrdKernels& crd;
  const SakdKernels& sakd;
  const PooledKernels& pooled;
};

// Defined at the end of the .inl files, by way of each operation's kernels.cpp.
#define FASTKD_CODE_PATH(path)                       \
  namespace path {                                   \
  extern const AttentionKernels attention_kernels;   \
  extern const CrdKernels crd_kernels;               \
  extern const SakdKernels sakd_kernels;             \
  extern const PooledKernels pooled_kernels;         \
  extern const DifferenceKernels difference_kernels; \
  extern const FspKernels fsp_kernels;               \
  extern const TapKernels tap_kernels;               \
  extern const NormKernels norm_kernels;             \
  extern const RkdKernels rkd_kernels;               \
  }
FASTKD_CODE_PATH(portable)
FASTKD_CODE_PATH(neon)
FASTKD_CODE_PATH(avx2)
FASTKD_CODE_PATH(avx512)

// The path in use: FASTKD_CPU, or what fastkd_set_cpu_path() chose, or else the best one that this CPU runs.
// Throws if FASTKD_CPU names no usable path.
const KernelTable& kernels();

// Whether the path in use may take AMX: "avx512", on a CPU that has it and a kernel that lends its registers,
// and not switched off.
bool tiles_available();

}  // namespace fastkd
