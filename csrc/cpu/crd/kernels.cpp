// Contrastive distillation against drawn rows of a bank.
#include "cpu/crd/crd.h"

#include "cpu/code_path.h"

#ifdef FASTKD_PATH_BUILT
namespace fastkd {
namespace FASTKD_PATH {

#include "cpu/simd/vec.inl"
#include "cpu/simd/functions.inl"
#include "cpu/crd/crd.inl"

}  // namespace FASTKD_PATH
}  // namespace fastkd
FASTKD_PATH_END
#endif
