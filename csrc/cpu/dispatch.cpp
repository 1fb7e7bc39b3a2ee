#include "cpu/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "common/tensor.h"
#include "cpu/processor.h"

#ifdef FASTKD_X86
#include <cpuid.h>
#endif
#ifdef FASTKD_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastkd {

#define FASTKD_KERNELS(operation, Kernels, path) extern const Kernels operation##_kernels;
#define FASTKD_CODE_PATH(path)            \
  namespace path {                        \
  FASTKD_OPERATIONS(FASTKD_KERNELS, path) \
  }
FASTKD_CODE_PATH(portable)
FASTKD_CODE_PATH(neon)
FASTKD_CODE_PATH(avx2)
FASTKD_CODE_PATH(avx512)

namespace {

enum Status { kOk = 0, kUnknown = 1, kUnsupported = 2, kNotBuilt = 3, kForeign = 4 };

#define FASTKD_ENTRY(operation, Kernels, path) path::operation##_kernels,
#define FASTKD_TABLE(path) {#path, FASTKD_OPERATIONS(FASTKD_ENTRY, path)}
constexpr KernelTable kPortable = FASTKD_TABLE(portable);
#ifdef FASTKD_ARM
constexpr KernelTable kNeon = FASTKD_TABLE(neon);
#endif
#ifdef FASTKD_X86
constexpr KernelTable kAvx2 = FASTKD_TABLE(avx2);
constexpr KernelTable kAvx512 = FASTKD_TABLE(avx512);

struct Registers {
  unsigned a, b, c, d;
};
Registers cpuid(unsigned leaf) {
  Registers r = {};
  __get_cpuid_count(leaf, 0, &r.a, &r.b, &r.c, &r.d);  // leaves zeros where the processor has no such leaf
  return r;
}

// The compiler's own test asks the operating system for the vectors' registers too, but does not know every
// name: GCC 10 lacks f16c, clang those of AMX. cpuid is asked for these.
bool cpu_has_avx2() {
  constexpr unsigned kF16c = 1u << 29;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && (cpuid(1).c & kF16c) != 0;
}

bool cpu_has_avx512() {
  return cpu_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

#ifdef FASTKD_AMX
// Asks Linux for the registers, once: they are too large to be every process's.
bool cpu_has_amx() {
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  static const bool has = cpu_has_avx512() && (~cpuid(7).d & (kAmxBf16 | kAmxTile)) == 0 &&
                          syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return has;
}
#endif

bool always() { return true; }

// A code path: its table, and whether this CPU runs it; or no table, and why there is none.
struct Path {
  const char* name;
  const KernelTable* table;
  bool (*runs)();
  Status without;
};
// Why a path has no table; where all have one, these are unused.
#ifdef __x86_64__
[[maybe_unused]] constexpr Status kNoAvx = kNotBuilt;  // the compiler is too old
#else
[[maybe_unused]] constexpr Status kNoAvx = kForeign;
#endif
#ifdef __aarch64__
[[maybe_unused]] constexpr Status kNoNeon = kNotBuilt;
#else
[[maybe_unused]] constexpr Status kNoNeon = kForeign;
#endif
constexpr Path kPaths[] = {
// the best first
#ifdef FASTKD_X86
    {"avx512", &kAvx512, cpu_has_avx512, kOk},
    {"avx2", &kAvx2, cpu_has_avx2, kOk},
#else
    {"avx512", nullptr, always, kNoAvx},
    {"avx2", nullptr, always, kNoAvx},
#endif
#ifdef FASTKD_ARM
    {"neon", &kNeon, always, kOk},
#else
    {"neon", nullptr, always, kNoNeon},
#endif
    {"portable", &kPortable, always, kOk},
};

Status find(const char* name, const KernelTable** found) {
  for (const Path& path : kPaths) {
    if (std::strcmp(name, path.name) != 0) continue;
    if (path.table == nullptr) return path.without;
    if (!path.runs()) return kUnsupported;
    *found = path.table;
    return kOk;
  }
  return kUnknown;
}

const KernelTable* best() {
  for (const Path& path : kPaths)
    if (path.table != nullptr && path.runs()) return path.table;
  return &kPortable;
}

// The table FASTKD_CPU asks for; nullptr if it asks for none that can be had. Read once: the environment is
// not to be read while other threads run.
const KernelTable* initial() {
  const char* name = std::getenv("FASTKD_CPU");
  if (name == nullptr || *name == '\0') return best();
  const KernelTable* table = nullptr;
  return find(name, &table) == kOk ? table : nullptr;
}

std::atomic<const KernelTable*>& current() {
  static std::atomic<const KernelTable*> table{initial()};
  return table;
}

std::atomic<bool>& amx_wanted() {
  static std::atomic<bool> wanted{true};
  return wanted;
}

}  // namespace

bool tiles_available() {
#ifdef FASTKD_AMX
  return amx_wanted().load(std::memory_order_relaxed) && &kernels() == &kAvx512 && cpu_has_amx();
#else
  return false;
#endif
}

const KernelTable& kernels() {
  const KernelTable* table = current().load(std::memory_order_relaxed);
  STD_TORCH_CHECK(table != nullptr,
                  "FASTKD_CPU must be portable, neon, avx2 or avx512, and a code path that this CPU can run");
  return *table;
}

}  // namespace fastkd

// For ctypes. The name of the code path in use; a null pointer if FASTKD_CPU names none that can be had (each
// operator call then raises).
extern "C" __attribute__((visibility("default"))) const char* fastkd_cpu_path() {
  const fastkd::KernelTable* table = fastkd::current().load(std::memory_order_relaxed);
  return table == nullptr ? nullptr : table->name;
}

// Whether a code path can run here: 0 yes, 1 there is no such name, 2 this CPU lacks it, 3 this build
// does, 4 it is for another kind of processor.
extern "C" __attribute__((visibility("default"))) int fastkd_find_cpu_path(const char* name) {
  const fastkd::KernelTable* table = nullptr;
  return fastkd::find(name, &table);
}

// Chooses the code path for all threads; returns what fastkd_find_cpu_path() does. An empty name chooses the
// best one.
extern "C" __attribute__((visibility("default"))) int fastkd_set_cpu_path(const char* name) {
  const fastkd::KernelTable* table = nullptr;
  if (name == nullptr || *name == '\0') {
    table = fastkd::best();
  } else {
    const fastkd::Status status = fastkd::find(name, &table);
    if (status != fastkd::kOk) return status;
  }
  fastkd::current().store(table, std::memory_order_relaxed);
  return fastkd::kOk;
}

// Whether AMX is used now; and whether the path "avx512" may use it where the CPU has it, as it may unless
// told otherwise.
extern "C" __attribute__((visibility("default"))) int fastkd_amx() {
  return fastkd::tiles_available() ? 1 : 0;
}
extern "C" __attribute__((visibility("default"))) void fastkd_set_amx(int wanted) {
  fastkd::amx_wanted().store(wanted != 0, std::memory_order_relaxed);
}
