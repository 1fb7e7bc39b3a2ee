// The kernels for CPUs with AVX2, FMA and F16C. Headers stand before the pragma, so that nothing of theirs is compiled for this instruction
// set.
#include "dispatch.h"

#ifdef FASTKD_X86
#include <immintrin.h>

#include <cmath>

#pragma GCC target("avx2,fma,f16c")
#define FASTKD_VECTOR_BYTES 32
#define FASTKD_TARGET avx2
#include "kernels.inl"
#endif
