"""The reference: every operation of fastkd in plain PyTorch, differentiable twice, on any device.

Same names and signatures as the public functions. Inputs may be float16, bfloat16, float32 or float64 and
differ in dtype; everything is computed and returned in float32, or in float64 if any input is float64,
whatever autocast says. The kernels are tested against these formulas in float64.
"""

from fastkd.reference.attention import attention_map, attention_transfer_loss, relu_tap, tap
from fastkd.reference.fsp import fsp_loss, fsp_matrix
from fastkd.reference.maps import batch_norm, hcl_loss, norm_loss, ofd_loss, ofd_margin
from fastkd.reference.sakd import sakd_loss, sakd_map
from fastkd.reference.vectors import crd_loss, dkd_loss, kd_loss, rkd_loss
