// The kernels for CPUs with AVX-512 (F, BW, DQ, VL). Headers stand before the pragma, so that nothing of theirs is compiled for this
// instruction set.
#include "dispatch.h"

#ifdef FASTKD_X86
#include <immintrin.h>

#include <cmath>

// GCC takes the deliberately undefined operands of its own intrinsics for uninitialized variables.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#define FASTKD_VECTOR_BYTES 64
#define FASTKD_TARGET avx512
#include "kernels.inl"
#endif
