// Batch norms in training.
#include "cpu/batch_norm/batch_norm.h"

#include "cpu/code_path.h"

#ifdef FASTKD_PATH_BUILT
namespace fastkd {
namespace FASTKD_PATH {

#include "cpu/simd/vec.inl"
#include "cpu/simd/functions.inl"
#include "cpu/batch_norm/batch_norm.inl"

}  // namespace FASTKD_PATH
}  // namespace fastkd
FASTKD_PATH_END
#endif
