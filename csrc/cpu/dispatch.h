// The table of kernels of one CPU code path, and the choice among the paths. It names the operations' kernels
// only, so that a change in an operation's header compiles that operation again and no other.
#pragma once

// X(operation, the type of its kernels, path) for each operation. `operation`_kernels of that type stands at
// the end of the operation's .inl file, once in each path's namespace.
#define FASTKD_OPERATIONS(X, path)       \
  X(attention, AttentionKernels, path)   \
  X(crd, CrdKernels, path)               \
  X(difference, DifferenceKernels, path) \
  X(fsp, FspKernels, path)               \
  X(norm, NormKernels, path)             \
  X(pooled, PooledKernels, path)         \
  X(rkd, RkdKernels, path)               \
  X(sakd, SakdKernels, path)             \
  X(tap, TapKernels, path)

namespace fastkd {

#define FASTKD_DECLARED(operation, Kernels, path) struct Kernels;
FASTKD_OPERATIONS(FASTKD_DECLARED, )
#undef FASTKD_DECLARED

struct KernelTable {
  const char* name;  // "portable", "neon", "avx2", "avx512"
#define FASTKD_FIELD(operation, Kernels, path) const Kernels& operation;
  FASTKD_OPERATIONS(FASTKD_FIELD, )
#undef FASTKD_FIELD
};

// The path in use: FASTKD_CPU, or what fastkd_set_cpu_path() chose, or else the best one that this CPU runs.
// Throws if FASTKD_CPU names no usable path.
const KernelTable& kernels();

// Whether AMX may be used: the path in use is "avx512", the CPU has AMX, the operating system grants its
// registers, and nobody has switched it off.
bool tiles_available();

}  // namespace fastkd
