"""The losses as modules, and every published variant of them as a preset.

A preset's ``weight`` is the coefficient its implementation multiplies the loss by. Sources:
szagoruyko/attention-transfer, HobbitLong/RepDistiller, megvii-research/mdistiller,
AberHu/Knowledge-Distillation-Zoo, hankyul2/KnowledgeDistillation, torchdistill, and the papers.
"""

from fastkd.losses.base import NumbersAsFloats
from fastkd.losses.maps import FSP, HCL, OFD, SAKD, AttentionTransfer
from fastkd.losses.vectors import CRD, DKD, KD, RKD

__all__ = ["CRD", "DKD", "FSP", "HCL", "KD", "OFD", "RKD", "SAKD", "AttentionTransfer", "NumbersAsFloats"]
