// Relations between the samples of a batch.
#include "cpu/rkd/rkd.h"

#include "cpu/code_path.h"

#ifdef FASTKD_PATH_BUILT
namespace fastkd {
namespace FASTKD_PATH {

#include "cpu/simd/vec.inl"
#include "cpu/rkd/rkd.inl"

}  // namespace FASTKD_PATH
}  // namespace fastkd
FASTKD_PATH_END
#endif
