// Losses of the differences of two features.
#include "cpu/difference/difference.h"

#include "cpu/code_path.h"

#ifdef FASTKD_PATH_BUILT
namespace fastkd {
namespace FASTKD_PATH {

#include "cpu/simd/vec.inl"
#include "cpu/simd/functions.inl"
#include "cpu/difference/difference.inl"
#include "cpu/difference/hcl.inl"
#include "cpu/difference/ofd.inl"
#include "cpu/difference/squares.inl"

extern const DifferenceKernels difference_kernels = {ofd, hcl, squares};

}  // namespace FASTKD_PATH
}  // namespace fastkd
FASTKD_PATH_END
#endif
