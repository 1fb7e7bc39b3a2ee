// Channel power maps of a feature with its mean over space.
#include "cpu/pooled/pooled.h"

#include "cpu/code_path.h"

#ifdef FASTKD_PATH_BUILT
namespace fastkd {
namespace FASTKD_PATH {

#include "cpu/simd/vec.inl"
#include "cpu/simd/functions.inl"
#include "cpu/pooled/pooled.inl"

}  // namespace FASTKD_PATH
}  // namespace fastkd
FASTKD_PATH_END
#endif
