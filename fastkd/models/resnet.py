"""CIFAR ResNets (He et al., 2016, section 4.2, but 1x1 shortcuts), under RepDistiller's state-dict names."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.models.features import Features, Group, Record, fixed, shown, through_neck
from fastkd.ops.batch_norm import conv_norm


class Shortcut(nn.Sequential):
    """A 1x1 convolution and its batch norm."""

    def forward(self, x: Tensor) -> Tensor:
        return conv_norm(self[0], self[1], x) if len(self) == 2 else super().forward(x)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, added to the input or to a shortcut, and a ReLU."""

    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = None
        if stride != 1 or width_in != width:
            self.downsample = Shortcut(
                nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor, record: Record | None = None) -> Tensor:
        out = conv_norm(self.conv1, self.bn1, x, relu=True)
        shortcut = x if self.downsample is None else self.downsample(x)
        if record is not None and record.preact:
            total = conv_norm(self.conv2, self.bn2, out, shortcut)
            record.before.append(total)
            return F.relu(total)
        if record is not None and record.tap is not None and record.last:
            y, attention = record.tap(conv_norm(self.conv2, self.bn2, out), shortcut)
            record.maps.append(attention)
            return y
        return conv_norm(self.conv2, self.bn2, out, shortcut, relu=True)


class ResNet(nn.Module):
    """(N, 3, 32, 32) -> logits (N, num_classes); with ``features`` one of True, "preact", "both", "pooled" ->
    (Features, logits).

    ``depth`` is 6n + 2, ``widths`` the channels of the stem and of the three groups. ``stem_kernel=7`` is the
    variant of hankyul2's tables: 7x7, stride 1, padding 1, so the maps are 28, 14 and 7 wide, and a
    Xavier-initialized classifier. ``tap``: a function (x, shortcut) -> (relu(x + shortcut), map),
    :func:`fastkd.relu_tap`, for the end of each group; the maps are then in ``Features.maps``. ``neck``, an
    Identity, stands between the last map and the pooling: it and ``fc`` may be exchanged.
    """

    def __init__(
        self,
        depth: int,
        widths: tuple[int, int, int, int] = (16, 16, 32, 64),
        num_classes: int = 10,
        stem_kernel: int = 3,
    ):
        super().__init__()
        if (depth - 2) % 6:
            raise ValueError(f"depth is {depth}, wanted 6n + 2 for a CIFAR ResNet, such as 8, 20 or 56")
        self.conv1 = nn.Conv2d(3, widths[0], stem_kernel, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        count = (depth - 2) // 6
        self.layer1 = self._group(widths[0], widths[1], count, 1)
        self.layer2 = self._group(widths[1], widths[2], count, 2)
        self.layer3 = self._group(widths[2], widths[3], count, 2)
        self.neck: nn.Module = nn.Identity()
        self.fc: nn.Module = nn.Linear(widths[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if stem_kernel == 7:
            nn.init.xavier_uniform_(self.fc.get_parameter("weight"))

    @staticmethod
    def _group(width_in: int, width: int, count: int, stride: int) -> Group:
        first = BasicBlock(width_in, width, stride)
        return Group(first, *(BasicBlock(width, width, 1) for _ in range(count - 1)))

    def forward(
        self,
        x: Tensor,
        features: bool | str = False,
        tap: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor | tuple[Features, Tensor]:
        features, tap = fixed("features", features, False), fixed("tap", tap, None)
        record = Record(features, tap) if features or tap is not None else None
        x = stem = conv_norm(self.conv1, self.bn1, x, relu=True)
        stages, before = [], []
        for group in (self.layer1, self.layer2, self.layer3):
            x = group(x) if record is None or features == "pooled" else group(x, record=record)
            stages.append(x)
            before += [] if record is None else record.before[-1:]
        final = through_neck(self.neck, x, record)
        pooled = final.mean((2, 3))
        logits = self.fc(pooled)
        if record is None or not features:
            return logits
        return shown(features, record, stem, stages, before, record.before, pooled, final), logits

    def norms_before_relu(self) -> tuple[nn.Module, ...]:
        """The batch norm that ends in each of ``stages`` with ``features="preact"``, before the shortcut."""
        return tuple(group[-1].get_submodule("bn2") for group in (self.layer1, self.layer2, self.layer3))
