"""What the machine code of the calls in triton_cases.py holds at least, by the case and the kernel."""

from __future__ import annotations

# Accesses of 16 bytes that a thread makes for one tile of each feature: 8 of float32, 4 of half precision,
# where a tile is full.
WIDE = {
    "cifar": {"loss_kernel": {"ld": 6 * 8}, "gradient_kernel": {"ld": 3 * 8, "st": 3 * 8}},
    "cifar channels_last bf16": {"loss_kernel": {"ld": 6 * 4}, "gradient_kernel": {"ld": 3 * 4, "st": 3 * 4}},
    "resnet50": {"loss_kernel": {"ld": 8 * 8}, "gradient_kernel": {"ld": 4 * 8, "st": 4 * 8}},
    "resnet50 bf16": {"loss_kernel": {"ld": 8 * 4}, "gradient_kernel": {"ld": 4 * 4, "st": 4 * 4}},
    "resnet50 channels_last": {"loss_kernel": {"ld": 8 * 8}, "gradient_kernel": {"ld": 4 * 8, "st": 4 * 8}},
    "resnet50 channels_last fp16": {
        "loss_kernel": {"ld": 8 * 4},
        "gradient_kernel": {"ld": 4 * 4, "st": 4 * 4},
    },
    "7x7": {"loss_kernel": {"ld": 2 * 8}, "gradient_kernel": {"ld": 8, "st": 8}},
    "7x7 bf16": {"loss_kernel": {"ld": 2 * 4}, "gradient_kernel": {"ld": 4, "st": 4}},
    "map": {"map_kernel": {"ld": 8}, "map_gradient_kernel": {"ld": 8, "st": 8}},
    "map bf16": {"map_kernel": {"ld": 4}, "map_gradient_kernel": {"ld": 4, "st": 4}},
    "map channels_last bf16": {"map_kernel": {"ld": 4}, "map_gradient_kernel": {"ld": 4, "st": 4}},
}
# what FSP's products are made of; None: no tensor cores
PRODUCTS = {
    "fsp resnet50": None,
    "fsp resnet50 tf32": "tf32",
    "fsp resnet32x4 tf32": "tf32",
    "fsp resnet32x4 bf16": "bf16",
    "fsp resnet50 channels_last bf16": "bf16",
    "fsp cifar": None,
    "fsp cifar tf32x3": "tf32",
    "fsp resnet50 tf32x3": "tf32",
    "fsp wide tf32x3": "tf32",
    "fsp again": "tf32",
    "fsp cifar bf16": "bf16",
    "matrix tf32": "tf32",
}
# accesses of 16 bytes in each kernel where the layout allows them everywhere, at least so many, and of 4
# bytes at most: the upstream gradient, shares of the loss and, where squares of 49 positions take a matrix's
# place, their rows
FSP_WIDE = {"fsp resnet50 channels_last bf16": (9, 14, 104), "matrix tf32": (8, 16, 8)}
# How many instructions copy to shared memory while others go on, at least, in a loss and in its gradients.
# Losses on sm_80 have one stage in "tf32x3", and with Triton 3.6 and 3.7 in "ieee": two leave too few
# registers. A copy of 16 bytes counts as one of 4 does.
COPIES = {
    "fsp cifar bf16": (8, 16),
    "fsp cifar": (50, 100),
    "fsp cifar tf32x3": (100, 130),
    "fsp resnet50": (230, 280),
    "fsp resnet50 tf32x3": (260, 280),
    "fsp wide tf32x3": (140, 180),
    "fsp columns": (12, 40),
    "fsp resnet32x4 tf32": (170, 120),
    "fsp resnet32x4 bf16": (8, 20),
    "fsp resnet50 tf32": (340, 180),
    "fsp resnet50 channels_last bf16": (60, 100),
    "fsp again": (80, 170),
    "fsp pooled": (40, 40),
}
