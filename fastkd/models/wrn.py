"""Wide ResNets (Zagoruyko and Komodakis, 2016), under RepDistiller's state-dict names."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.models.features import Features, Group, Record, fixed, shown, through_neck
from fastkd.ops.batch_norm import add, batch_norm, conv_norm, untouched


class PreactBlock(nn.Module):
    """BN-ReLU-conv twice, added to the input or to a bare 1x1 convolution of the first activation.

    With ``record.preact`` bn1's output, the previous block's map before ReLU, goes into ``record.before``.
    """

    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.convShortcut = None if width_in == width else nn.Conv2d(width_in, width, 1, stride, bias=False)

    def forward(self, x: Tensor, record: Record | None = None) -> Tensor:
        if record is not None and record.preact:
            norm = batch_norm(self.bn1, x)
            record.before.append(norm)
            active = F.relu(norm)
        else:
            active = batch_norm(self.bn1, x, relu=True)
        out = self.conv2(conv_norm(self.conv1, self.bn2, active, relu=True))
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        return add(out, shortcut, owned=untouched(self.conv2, nn.Conv2d))


class LayerGroup(nn.Module):
    """A group under the name ``layer``, as in the published state dicts: block1.layer.0.conv1.weight."""

    def __init__(self, *blocks: nn.Module):
        super().__init__()
        self.layer = Group(*blocks)

    def forward(self, x: Tensor, record: Record | None = None) -> Tensor:
        return self.layer(x) if record is None else self.layer(x, record=record)


class WideResNet(nn.Module):
    """(N, 3, 32, 32) -> logits (N, num_classes); with ``features`` one of True, "preact", "both", "pooled" ->
    (Features, logits).

    ``depth`` is 6n + 4.

    ``tap``: a function x -> (x, map), :func:`fastkd.tap`, for the raw sum that ends each group; the maps are
    then in ``Features.maps``. ``neck``, an Identity, stands between ReLU(bn1(last sum)) and the pooling: it
    and ``fc`` may be exchanged.
    """

    def __init__(self, depth: int, factor: int, num_classes: int = 10):
        super().__init__()
        if (depth - 4) % 6:
            raise ValueError(f"depth is {depth}, wanted 6n + 4 for a wide ResNet, such as 16, 28 or 40")
        count, widths = (depth - 4) // 6, (16, 16 * factor, 32 * factor, 64 * factor)
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.block1 = self._group(widths[0], widths[1], count, 1)
        self.block2 = self._group(widths[1], widths[2], count, 2)
        self.block3 = self._group(widths[2], widths[3], count, 2)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.neck: nn.Module = nn.Identity()
        self.fc: nn.Module = nn.Linear(widths[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
        nn.init.zeros_(self.fc.get_parameter("bias"))

    @staticmethod
    def _group(width_in: int, width: int, count: int, stride: int) -> LayerGroup:
        first = PreactBlock(width_in, width, stride)
        return LayerGroup(first, *(PreactBlock(width, width, 1) for _ in range(count - 1)))

    def forward(
        self,
        x: Tensor,
        features: bool | str = False,
        tap: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor | tuple[Features, Tensor]:
        features, tap = fixed("features", features, False), fixed("tap", tap, None)
        record = Record(features, tap) if features or tap is not None else None
        x = stem = self.conv1(x)
        stages, ends = [], []
        for group in (self.block1, self.block2, self.block3):
            x = group(x) if record is None or features == "pooled" else group(x, record=record)
            if record is not None and tap is not None:
                x, attention = tap(x)
                record.blocks[-1] = x
                record.maps.append(attention)
            stages.append(x)
            if record is not None:
                ends.append(len(record.blocks))
        preact = record is not None and record.preact
        norm = batch_norm(self.bn1, x, relu=not preact)
        final = through_neck(self.neck, F.relu(norm) if preact else norm, record)
        pooled = final.mean((2, 3))
        logits = self.fc(pooled)
        if record is None or not features:
            return logits
        # of a block: what the next batch norm made of its sum
        before = [*record.before[1:], norm] if preact else []
        stages_before = [before[end - 1] for end in ends if preact]
        return shown(features, record, stem, stages, stages_before, before, pooled, final), logits

    def norms_before_relu(self) -> tuple[nn.Module, ...]:
        """The batch norm that gives each of ``stages`` with ``features="preact"``: the first of the next
        group, or the last of all.
        """
        return *(group.get_submodule("layer.0.bn1") for group in (self.block2, self.block3)), self.bn1
