// Attention maps, the loss over them, and the taps, which share most of their loops.
#include "cpu/attention/tap.h"

#include "cpu/code_path.h"

#ifdef FASTKD_PATH_BUILT
namespace fastkd {
namespace FASTKD_PATH {

#include "cpu/simd/vec.inl"
#include "cpu/simd/pool.inl"
#include "cpu/attention/power.inl"
#include "cpu/attention/planes.inl"
#include "cpu/attention/planes_gradient.inl"
#include "cpu/attention/last.inl"
#include "cpu/attention/norm.inl"
#include "cpu/attention/sample.inl"
#include "cpu/attention/attention.inl"
#include "cpu/attention/tap.inl"

}  // namespace FASTKD_PATH
}  // namespace fastkd
FASTKD_PATH_END
#endif
