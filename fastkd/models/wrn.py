"""Wide ResNets (Zagoruyko and Komodakis, 2016), under RepDistiller's state-dict names."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.models.features import Features
from fastkd.ops.norm import add_, batch_norm


class PreactBlock(nn.Module):
    """BN-ReLU-conv twice, added to the input or to a bare 1x1 convolution of the first activation.

    Returns the raw sum and bn1's output, which is the previous block's pre-activation map when ``keep_norm``, else already overwritten.
    """

    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.convShortcut = None if width_in == width else nn.Conv2d(width_in, width, 1, stride, bias=False)

    def forward(self, x: Tensor, keep_norm: bool = False) -> tuple[Tensor, Tensor]:
        active = norm = batch_norm(self.bn1, x, relu=not keep_norm)
        if keep_norm:
            active = F.relu(norm)
        out = batch_norm(self.bn2, self.conv1(active), relu=True)
        return add_(self.conv2(out), x if self.convShortcut is None else self.convShortcut(active)), norm


class WideResNet(nn.Module):
    """(N, 3, 32, 32) -> logits (N, num_classes); with ``features`` True or "preact" -> (Features, logits). ``depth`` is 6n + 4.

    ``tap``: a function x -> (x, map), :func:`fastkd.tap`, for the raw sum that ends each group; the maps are then in ``Features.maps``.
    """

    def __init__(self, depth: int, factor: int, num_classes: int = 10):
        super().__init__()
        if (depth - 4) % 6:
            raise ValueError(f"depth is {depth}, a wide ResNet has 6n + 4")
        count, widths = (depth - 4) // 6, (16, 16 * factor, 32 * factor, 64 * factor)
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.block1 = self._group(widths[0], widths[1], count, 1)
        self.block2 = self._group(widths[1], widths[2], count, 2)
        self.block3 = self._group(widths[2], widths[3], count, 2)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
        nn.init.zeros_(self.fc.bias)

    @staticmethod
    def _group(width_in: int, width: int, count: int, stride: int) -> nn.ModuleDict:
        first = PreactBlock(width_in, width, stride)
        # the level called "layer" is there for the sake of the published names, block1.layer.0.conv1.weight
        return nn.ModuleDict({"layer": nn.Sequential(first, *(PreactBlock(width, width, 1) for _ in range(count - 1)))})

    def forward(
        self, x: Tensor, features: bool | str = False, tap: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    ) -> Tensor | tuple[Features, Tensor]:
        preact = features == "preact"
        if preact and tap is not None:
            raise ValueError('tap and features="preact" exclude each other: the tap is on the sums before the batch norm')
        x = stem = self.conv1(x)
        blocks, norms, ends, taken = [], [], [], []
        for group in (self.block1, self.block2, self.block3):
            for block in group["layer"].children():
                x, norm = block(x, preact)
                blocks.append(x)
                norms.append(norm)
            if tap is not None:
                blocks[-1], attention = tap(x)
                x = blocks[-1]
                taken.append(attention)
            ends.append(len(blocks) - 1)
        norm = batch_norm(self.bn1, x, relu=not preact)
        pooled = (F.relu(norm) if preact else norm).mean((2, 3))
        logits = self.fc(pooled)
        if not features:
            return logits
        maps = [*norms[1:], norm] if preact else blocks
        return Features(stem, tuple(maps[i] for i in ends), pooled, tuple(maps), tuple(taken)), logits
