// The kernels for any CPU: 16-byte vectors, which every compiler with vector extensions maps to what the machine has (SSE2, NEON) or to
// scalars.
#include "dispatch.h"

#include <cmath>

#define FASTKD_VECTOR_BYTES 16
#define FASTKD_TARGET portable
#include "kernels.inl"
