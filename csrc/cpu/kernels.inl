// Every kernel, in the namespace of the code path that includes this file (portable.cpp, avx2.cpp, avx512.cpp). An operation adds its .inl
// file here, and its struct of function pointers to KernelTable.
//
// Rules for all .inl files, which are compiled under a #pragma GCC target: use only what is defined in this namespace, raw pointers, the
// plain structs of common.h, compiler builtins, intrinsics and functions of libm. No std:: templates, no inline functions of headers (see
// common.h).
namespace fastkd {
namespace FASTKD_TARGET {

// vec.inl first, which all use; then pool.inl; then the operations.
#include "vec.inl"
#include "pool.inl"
#include "attention_power.inl"
#include "attention_planes.inl"
#include "attention_last.inl"
#include "attention_norm.inl"
#include "attention.inl"
#include "gram.inl"
#include "tap.inl"
#include "norm.inl"

#define FASTKD_STRING_(x) #x
#define FASTKD_STRING(x) FASTKD_STRING_(x)
extern const KernelTable table = {FASTKD_STRING(FASTKD_TARGET), attention_kernels, gram_kernels, tap_kernels, norm_kernels};

}  // namespace FASTKD_TARGET
}  // namespace fastkd
