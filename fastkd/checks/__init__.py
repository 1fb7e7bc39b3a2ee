"""Argument checks: misuse gets one sentence with the argument's name, what was given and what was wanted.

Floor 0: used by the reference before it computes, and by the operations to explain a refusal.
"""

from fastkd.checks.attention import (
    CHANNEL_REDUCE,
    DIFFERENCE,
    EPS_MODE,
    POOL,
    POOL_MODE,
    REDUCE,
    attention_map,
    attention_options,
    attention_transfer,
    one_position,
    relu_tap,
    sakd_loss,
    sakd_map,
    tokens,
)
from fastkd.checks.distillation import distillation, epoch_of, image_numbers, label_values, train_labels
from fastkd.checks.fsp import DISTANCE, PRECISION, fsp_loss, fsp_matrix, fsp_options
from fastkd.checks.maps import hcl_loss, ofd_loss, ofd_margin, ofd_margins
from fastkd.checks.numbers import (
    above_zero,
    are_floats,
    constant,
    explain,
    known_to_graph,
    number,
    option,
    power,
    stage_weights,
    switch,
)
from fastkd.checks.tensors import (
    FLOATS,
    Features,
    channels_second,
    describe,
    feature,
    fits,
    floating,
    listed,
    pairs_up,
    same_batch,
    same_rank,
    stage_pairs,
    stages,
)
from fastkd.checks.vectors import (
    ACTIVATION,
    KD_REDUCTION,
    crd_banks,
    crd_loss,
    crd_rows,
    dkd_loss,
    kd_loss,
    rkd_loss,
)
