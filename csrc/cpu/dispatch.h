// The table of kernels of one CPU code path, and the choice among the paths.
#pragma once

#include "attention.h"
#include "gram.h"
#include "norm.h"
#include "tap.h"

namespace fastkd {

struct KernelTable {
  const char* name;  // "portable", "avx2", "avx512"
  AttentionKernels attention;
  GramKernels gram;
  TapKernels tap;
  NormKernels norm;
};

// Each is defined by the file of its name (through kernels.inl). AVX paths exist only in builds with GCC for x86-64 (FASTKD_X86).
namespace portable {
extern const KernelTable table;
}
namespace avx2 {
extern const KernelTable table;
}
namespace avx512 {
extern const KernelTable table;
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FASTKD_X86 1
#if defined(__linux__) && __GNUC__ >= 11
#define FASTKD_AMX 1
#endif
#endif

// The path in use: FASTKD_CPU, or what fastkd_set_cpu_path() chose, or else the best one that this CPU runs. Throws if FASTKD_CPU names no
// usable path.
const KernelTable& kernels();

// Whether the path in use may take AMX: "avx512", on a CPU that has it and a kernel that lends its registers, and not switched off.
bool tiles_available();

}  // namespace fastkd
