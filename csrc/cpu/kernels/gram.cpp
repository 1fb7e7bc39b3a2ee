// FSP matrices and the loss over them.
#include "../code_path.h"

#ifdef FASTKD_PATH_BUILT
namespace fastkd {
namespace FASTKD_PATH {

#include "../vec.inl"
#include "../pool.inl"
#include "../gram.inl"

}  // namespace FASTKD_PATH
}  // namespace fastkd
FASTKD_PATH_END
#endif
