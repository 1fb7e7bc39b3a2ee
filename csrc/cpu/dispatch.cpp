#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#ifdef FASTKD_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastkd {
namespace {

enum Status { kOk = 0, kUnknown = 1, kUnsupported = 2 };

bool cpu_has_avx2() {
#ifdef FASTKD_X86
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

bool cpu_has_avx512() {
#ifdef FASTKD_X86
  return cpu_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

// Asks Linux for the registers, once: they are too large to be every process's.
bool cpu_has_amx() {
#ifdef FASTKD_AMX
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool has = cpu_has_avx512() && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
                          syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return has;
#else
  return false;
#endif
}

Status find(const char* name, const KernelTable** found) {
  if (std::strcmp(name, "portable") == 0) {
    *found = &portable::table;
    return kOk;
  }
  const bool is_avx2 = std::strcmp(name, "avx2") == 0;
  if (!is_avx2 && std::strcmp(name, "avx512") != 0) return kUnknown;
  if (is_avx2 ? !cpu_has_avx2() : !cpu_has_avx512()) return kUnsupported;
#ifdef FASTKD_X86
  *found = is_avx2 ? &avx2::table : &avx512::table;
#endif
  return kOk;
}

const KernelTable* best() {
  const KernelTable* table = nullptr;
  if (find("avx512", &table) != kOk && find("avx2", &table) != kOk) table = &portable::table;
  return table;
}

// The table FASTKD_CPU asks for; nullptr if it asks for none that can be had. Read once: the environment is not to be read while other
// threads run.
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
  return amx_wanted().load(std::memory_order_relaxed) && &kernels() == &avx512::table && cpu_has_amx();
#else
  return false;
#endif
}

const KernelTable& kernels() {
  const KernelTable* table = current().load(std::memory_order_relaxed);
  STD_TORCH_CHECK(table != nullptr, "FASTKD_CPU must be portable, avx2 or avx512, and a code path that this CPU can run, got ",
                  std::getenv("FASTKD_CPU"));
  return *table;
}

}  // namespace fastkd

// For ctypes. The name of the code path in use; a null pointer if FASTKD_CPU names none that can be had (each operator call then raises).
extern "C" __attribute__((visibility("default"))) const char* fastkd_cpu_path() {
  const fastkd::KernelTable* table = fastkd::current().load(std::memory_order_relaxed);
  return table == nullptr ? nullptr : table->name;
}

// Chooses the code path for all threads: 0 done, 1 no such name, 2 this CPU (or this build) cannot run it. An empty name chooses the best
// one.
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

// Whether the path "avx512" takes AMX where the CPU has it, as it does unless told otherwise; returns whether it is taken now.
extern "C" __attribute__((visibility("default"))) int fastkd_amx() { return fastkd::tiles_available() ? 1 : 0; }
extern "C" __attribute__((visibility("default"))) void fastkd_set_amx(int wanted) {
  fastkd::amx_wanted().store(wanted != 0, std::memory_order_relaxed);
}
