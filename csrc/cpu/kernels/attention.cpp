// Attention maps, the loss over them, and the taps, which share most of their loops.
#include "../code_path.h"

#ifdef FASTKD_PATH_BUILT
namespace fastkd {
namespace FASTKD_PATH {

#include "../vec.inl"
#include "../pool.inl"
#include "../attention_power.inl"
#include "../attention_planes.inl"
#include "../attention_last.inl"
#include "../attention_norm.inl"
#include "../attention.inl"
#include "../tap.inl"

}  // namespace FASTKD_PATH
}  // namespace fastkd
FASTKD_PATH_END
#endif
