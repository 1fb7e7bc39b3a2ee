"""Reports of an epoch on image files: how long its steps waited for them, and which are damaged."""

from __future__ import annotations

import torch

from fastkd.data.loader import AnyBatches
from fastkd.data.streaming import StreamedBatches
from fastkd.io.console import counted
from fastkd.training import collectives

WORTH_SAYING = 0.05
"""The share of an epoch's time above which waiting for images is reported."""


class Reading:
    """The figures of one epoch of ``seconds``, of all processes together: each of them must construct one."""

    def __init__(self, batches: AnyBatches, seconds: float):
        self.share, self.skipped, self.skips, self.elsewhere = 0.0, 0, False, list[str]()
        if isinstance(batches, StreamedBatches):
            self.workers, self.skips = batches.workers, batches.on_bad == "skip"
            figures = torch.tensor([batches.waited / seconds / batches.share[1], float(batches.skipped)])
            self.share, self.skipped = collectives.add(figures.double()).tolist()
            if self.skips and batches.share[1] > 1:  # the other processes cannot say which files those are
                found = collectives.gathered([*batches.bad.items()])
                self.elsewhere = [why for path, why in found if path not in batches.bad]
                batches.bad.update(found)

    def figures(self) -> dict[str, float]:
        """A column of the table of epochs, where images may be skipped."""
        return {"skipped_images": self.skipped} if self.skips else {}

    def lines(self) -> list[str]:
        lines = [f"image skipped: {why}" for why in dict.fromkeys(self.elsewhere)]
        if self.skipped:
            number = counted(round(self.skipped), "image")
            lines.append(f"{number} of this epoch could not be read; others of the same batches stood in")
        if self.share > WORTH_SAYING:
            lines.append(
                f"{100 * self.share:.0f} % of the steps' time was waiting for images:"
                f" --workers is {self.workers}"
            )
        return lines
