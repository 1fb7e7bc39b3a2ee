"""Calls of every Triton launcher, by name: those that triton_compile.py makes on a GPU that is not there."""

from __future__ import annotations

from typing import Any

import torch

from fastkd import kernels
from fastkd._bits import ATTENTION, FSP
from fastkd.kernels.fsp.saved import wide_stages


def feature(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool = False) -> torch.Tensor:
    x = torch.empty(shape, dtype=dtype)
    return x.to(memory_format=torch.channels_last) if channels_last else x


OPTIONS = (2.0, "mean", False, 1e-12, "clamp")
AT = dict(channel_reduce="mean", pool="before", student_grad=True)


def transfer(
    student: Any, teacher: Any, p: float = 2.0, eps: float = 1e-12, **options: Any
) -> list[torch.Tensor]:
    """The loss by its launcher; the coefficients."""
    numbers = [0.0, p, eps, 1.0]
    packed = ATTENTION.pack(**AT | options)
    coefficients: list[torch.Tensor] = kernels.launcher("attention_transfer_loss")(
        student, teacher, packed, numbers
    )[1]
    return coefficients


def transfer_backward(wanted: Any, ks: Any, p: float = 2.0, **options: Any) -> None:
    packed = ATTENTION.pack(**AT | options)
    kernels.launcher("attention_transfer_loss_backward")(torch.empty(()), wanted, ks, p, packed)


def loss(
    sizes: list[tuple[int, int]], dtype: torch.dtype, batch: int, channels_last: bool = False, **options: Any
) -> None:
    student, teacher = ([feature((batch, c, s, s), dtype, channels_last) for c, s in sizes] for _ in range(2))
    ks = transfer(student, teacher, **options)
    wanted = student * options.get("student_grad", True) + teacher * options.get("teacher_grad", False)
    options.pop("eps", None)
    transfer_backward(wanted, ks, **options)


def pooled() -> None:
    student, teacher = feature((4, 8, 12, 12), torch.bfloat16), feature((4, 6, 7, 7), torch.float32, True)
    for pool, pool_mode in (("before", "avg"), ("after", "max")):
        ks = transfer([student], [teacher], pool=pool, pool_mode=pool_mode)
        transfer_backward([student], ks, pool=pool, pool_mode=pool_mode)


def unaligned() -> None:
    """The same shapes and strides, once at addresses that are multiples of 16 and once at others."""
    shape = (4, 8, 16, 16)
    for offset in (0, 1):
        x = torch.empty(4 * 8 * 256 + 1)[offset:][: 4 * 8 * 256].view(shape)
        transfer([x], [x])


def maps(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool = False) -> None:
    x, grad = feature(shape, dtype, channels_last), feature(shape, dtype, channels_last)
    y, norm = kernels.launcher("attention_map")(x, 2.0, "mean", False, True, 1e-12, "clamp")
    kernels.launcher("attention_map_backward")(
        torch.empty_like(y), x, y, norm, 2.0, "mean", False, True, 1e-12, "clamp"
    )
    out, y, norm = kernels.launcher("relu_tap")(x, grad, *OPTIONS)
    kernels.launcher("tap_backward")(grad, torch.empty_like(y), x, y, norm, *OPTIONS)
    kernels.launcher("relu_tap_backward")(grad, torch.empty_like(y), out, y, norm, *OPTIONS)


def fsp(
    student: list[tuple[int, int]],
    dtype: torch.dtype,
    batch: int,
    precision: str | None,
    channels_last: bool = False,
    teacher: list[tuple[int, int]] | None = None,
    pool_mode: str = "avg",
    distance: str = "squared",
) -> None:
    chains = [
        [feature((batch, c, s, s), dtype, channels_last) for c, s in sizes]
        for sizes in (student, teacher or student)
    ]
    options = FSP.pack(pool_mode=pool_mode, distance=distance, precision=precision, with_grad=True)
    _, ms, _ = kernels.launcher("fsp_loss")(*chains, options, [0.0, 1.0])
    stages, others = list(range(len(student))), [chains[1][i] for i in wide_stages(ms)]
    kernels.launcher("fsp_loss_backward")(torch.empty(()), chains[0], ms, options, stages, others)


def fsp_unaligned() -> None:
    for offset in (0, 1):
        x = torch.empty(4 * 16 * 256 + 1)[offset:][: 4 * 16 * 256].view(4, 16, 16, 16)
        a = torch.empty(4, 16, 16, 16)
        kernels.launcher("fsp_loss")([a, x], [a, x], FSP.pack(precision="tf32"), [0.0, 1.0])


def without_gradients() -> None:
    """Of the same tensors, first a loss alone, and then one whose gradients are wanted: what a kernel writes
    is part of it.
    """
    x = [torch.empty(4, 16, 8, 8), torch.empty(4, 16, 8, 8)]
    for student_grad in (False, True):
        options = FSP.pack(precision="tf32", with_grad=student_grad)
        kernels.launcher("fsp_loss")(x, x, options, [0.0, 1.0])
        transfer(x, x, student_grad=student_grad)


def matrix(shape: tuple[int, ...], dtype: torch.dtype, precision: str) -> None:
    a = feature(shape, dtype)
    options = FSP.pack(precision=precision, a_grad=True, b_grad=True)
    g = kernels.launcher("fsp_matrix")(a, a, options)
    kernels.launcher("fsp_matrix_backward")(g, a, a, options)


CIFAR = [(16, 32), (32, 16), (64, 8)]
RESNET50 = [(256, 56), (512, 28), (1024, 14), (2048, 7)]
RESNET32X4 = [(64, 32), (128, 16), (256, 8)]
# one pair by a matrix, one by products over channels, of several tiles (of 9x9 positions) and parts
WIDE = [(96, 18), (520, 9), (768, 9)]
# the last pair's matrix would be larger than the features
COLUMNS = [(70, 8), (9, 8), (130, 5), (200, 5)]
CASES = {
    "cifar": lambda: loss(CIFAR, torch.float32, 128),
    "cifar channels_last bf16": lambda: loss(CIFAR, torch.bfloat16, 128, True),
    "resnet50": lambda: loss(RESNET50, torch.float32, 8),
    "resnet50 bf16": lambda: loss(RESNET50, torch.bfloat16, 8),
    "resnet50 channels_last": lambda: loss(RESNET50, torch.float32, 8, True),
    "resnet50 channels_last fp16": lambda: loss(RESNET50, torch.float16, 8, True),
    "7x7": lambda: loss([(2048, 7)], torch.float32, 8),
    "7x7 bf16": lambda: loss([(2048, 7)], torch.bfloat16, 8),
    "all switches": lambda: loss(
        [(6, 5), (3, 4)],
        torch.float32,
        2,
        p=2.7,
        signed=True,
        eps_mode="add",
        pool_mode="max",
        difference="l2",
        stage_reduce="mean",
        teacher_grad=True,
    ),
    "p 3, odd": lambda: loss([(7, 5)], torch.bfloat16, 3, p=3.0, teacher_grad=True),
    "p 1.5": lambda: loss([(7, 5)], torch.float16, 3, p=1.5),
    "pooled": pooled,
    "unaligned": unaligned,
    "map": lambda: maps((8, 256, 56, 56), torch.float32),
    "map bf16": lambda: maps((8, 256, 56, 56), torch.bfloat16),
    "map channels_last bf16": lambda: maps((8, 256, 56, 56), torch.bfloat16, True),
    "map of one program": lambda: maps((8, 16, 8, 8), torch.float32),
    "fsp cifar bf16": lambda: fsp(CIFAR, torch.bfloat16, 128, None),
    "fsp cifar": lambda: fsp(CIFAR, torch.float32, 128, "ieee"),
    "fsp cifar tf32x3": lambda: fsp(CIFAR, torch.float32, 128, "tf32x3"),
    "fsp resnet32x4 tf32": lambda: fsp(RESNET32X4, torch.float32, 64, "tf32"),
    "fsp resnet32x4 bf16": lambda: fsp(RESNET32X4, torch.bfloat16, 64, None),
    "fsp resnet50": lambda: fsp(RESNET50, torch.float32, 8, "ieee"),
    "fsp resnet50 tf32x3": lambda: fsp(RESNET50, torch.float32, 8, "tf32x3"),
    "fsp resnet50 tf32": lambda: fsp(RESNET50, torch.float32, 8, "tf32"),
    "fsp resnet50 channels_last bf16": lambda: fsp(RESNET50, torch.bfloat16, 8, None, True),
    "fsp columns": lambda: fsp(COLUMNS, torch.float16, 2, "ieee", distance="column_l2"),
    "fsp resnet50 columns": lambda: fsp(RESNET50, torch.float32, 8, "tf32", distance="column_l2"),
    "fsp again": lambda: fsp(WIDE, torch.float32, 8, "tf32", True, [(96, 18), (520, 12), (768, 6)]),
    "fsp pooled": lambda: fsp(CIFAR, torch.float32, 4, "tf32", False, [(16, 9), (32, 9), (64, 4)], "max"),
    "fsp wide tf32x3": lambda: fsp(WIDE, torch.float32, 8, "tf32x3"),
    "fsp unaligned": fsp_unaligned,
    "fsp without gradients": without_gradients,
    "matrix tf32": lambda: matrix((8, 128, 16, 16), torch.float32, "tf32"),
}

# enough cases to compile every kernel
FEW = (
    "cifar channels_last bf16",
    "7x7 bf16",
    "pooled",
    "map bf16",
    "unaligned",
    "fsp resnet50",
    "fsp resnet50 tf32",
    "fsp columns",
    "matrix tf32",
    "fsp resnet50 channels_last bf16",
    "fsp resnet32x4 tf32",
    "fsp wide tf32x3",
    "fsp unaligned",
)
