// FSP matrices and the loss over them.
#include "cpu/fsp/fsp.h"

#include "cpu/code_path.h"

#ifdef FASTKD_PATH_BUILT
namespace fastkd {
namespace FASTKD_PATH {

#include "cpu/simd/vec.inl"
#include "cpu/simd/pool.inl"
#include "cpu/fsp/fsp.inl"

}  // namespace FASTKD_PATH
}  // namespace fastkd
FASTKD_PATH_END
#endif
