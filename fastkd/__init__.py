"""Fused kernels for knowledge distillation: attention transfer and FSP, float16 to float64, both passes.

Functions :func:`attention_map`, :func:`attention_transfer_loss`, :func:`fsp_matrix`, :func:`fsp_loss`,
:func:`kd_loss`, :func:`dkd_loss`, :func:`rkd_loss`, :func:`crd_loss`, :func:`ofd_margin`, :func:`ofd_loss`,
:func:`hcl_loss`, :func:`sakd_map`, :func:`sakd_loss`; :func:`tap` and :func:`relu_tap`, which take an
attention map on the feature's way through the network; modules :class:`AttentionTransfer`, :class:`FSP`,
:class:`KD`, :class:`DKD`, :class:`RKD`, :class:`CRD`, :class:`OFD`, :class:`HCL`, :class:`SAKD` with the
published variants as presets; :class:`Distillation`, which joins student, teacher and method, and
:class:`SeveralTeachers`; :func:`extract`, which takes features of any network, with :func:`tokens_to_map` for
transformers; :mod:`fastkd.reference`, all of it in plain PyTorch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from fastkd import backends, models, native, ops, reference
from fastkd.backends import BackendError, use_backend
from fastkd.losses import CRD, DKD, FSP, HCL, KD, OFD, RKD, SAKD, AttentionTransfer
from fastkd.models.extract import extract
from fastkd.models.tokens import tokens_to_map
from fastkd.ops.attention import attention_map, attention_transfer_loss
from fastkd.ops.crd import crd_loss
from fastkd.ops.feature_map import relu_tap, tap
from fastkd.ops.fsp import fsp_loss, fsp_matrix
from fastkd.ops.hcl import hcl_loss
from fastkd.ops.norm import norm_loss as _norm_loss  # so that its operator is there  # noqa: F401
from fastkd.ops.ofd import ofd_loss
from fastkd.ops.pooled import pooled_map as _pooled_map  # so that its operators are there  # noqa: F401
from fastkd.ops.rkd import rkd_loss
from fastkd.ops.sakd import sakd_loss, sakd_map
from fastkd.reference import dkd_loss, kd_loss, ofd_margin

if TYPE_CHECKING:
    from fastkd import distillation as distillation
    from fastkd import methods as methods
    from fastkd.distillation import Distillation
    from fastkd.methods.sum import Losses
    from fastkd.several_teachers import SeveralTeachers

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # imported when first asked for: the methods would take a third of the time of importing fastkd
    if name in ("methods", "distillation"):
        return importlib.import_module(f"fastkd.{name}")
    if name in ("Distillation", "Losses"):
        return getattr(importlib.import_module("fastkd.distillation"), name)
    if name == "SeveralTeachers":
        return importlib.import_module("fastkd.several_teachers").SeveralTeachers
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "CRD",
    "DKD",
    "FSP",
    "HCL",
    "KD",
    "OFD",
    "RKD",
    "SAKD",
    "AttentionTransfer",
    "BackendError",
    "Distillation",
    "Losses",
    "SeveralTeachers",
    "attention_map",
    "attention_transfer_loss",
    "backends",
    "crd_loss",
    "dkd_loss",
    "extract",
    "fsp_loss",
    "fsp_matrix",
    "hcl_loss",
    "kd_loss",
    "models",
    "native",
    "ofd_loss",
    "ofd_margin",
    "ops",
    "reference",
    "relu_tap",
    "rkd_loss",
    "sakd_loss",
    "sakd_map",
    "tap",
    "tokens_to_map",
    "use_backend",
]
