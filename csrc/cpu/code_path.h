// Every kernels.cpp includes this file after its own headers. setup.py compiles those files once per code
// path, with FASTKD_PATH (portable, neon, avx2 or avx512) and FASTKD_VECTOR_BYTES. The headers come before
// the target that is set below, so that nothing of theirs is compiled for this instruction set. A file's
// kernels stand in the namespace FASTKD_PATH and are followed by FASTKD_PATH_END.
//
// Rules for their .inl files: use only what is defined in this namespace, raw pointers, the plain structs
// of kernel.h, compiler builtins, intrinsics and functions of libm. No std:: templates, no inline functions
// of headers (see common/feature.h).
#pragma once

#include "cpu/processor.h"

#ifdef FASTKD_X86
#include <immintrin.h>
#endif

// FASTKD_NEON is defined where FASTKD_PATH is neon. #if cannot compare names, so the name becomes the end of
// a macro's: one that is 1, or one that is unknown, which counts as 0.
#define FASTKD_IS_NEON_neon 1
#define FASTKD_JOINED(a, b) a##b
#define FASTKD_IS_NEON(path) FASTKD_JOINED(FASTKD_IS_NEON_, path)
#if defined(FASTKD_ARM) && FASTKD_IS_NEON(FASTKD_PATH)
#define FASTKD_NEON 1
#include <arm_neon.h>
#endif

#include <cmath>

#if FASTKD_VECTOR_BYTES == 16  // every compiler with vector extensions maps these to what the machine has
                               // (SSE2, NEON), or to scalars
#define FASTKD_PATH_BUILT 1
#define FASTKD_PATH_END
#elif defined(FASTKD_X86) && defined(__clang__)
#define FASTKD_PATH_BUILT 1
#define FASTKD_PATH_END _Pragma("clang attribute pop")
#if FASTKD_VECTOR_BYTES == 64
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#endif
#elif defined(FASTKD_X86)
#define FASTKD_PATH_BUILT 1
#define FASTKD_PATH_END
// GCC takes the deliberately undefined operands of its own intrinsics for uninitialized variables.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#if FASTKD_VECTOR_BYTES == 64
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#endif
