"""scikit-learn's 1797 handwritten digits, which come with that package: nothing is read or downloaded."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastkd.data.base import Dataset
from fastkd.errors import UserError

TEST = 360  # the last images of scikit-learn's order


def load() -> Dataset:
    """The 8x8 digits resized to 32x32 and repeated to three channels; the last 360 are the test set. Never
    flipped. Raises UserError.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(
            "digits: the set comes with scikit-learn (pip install scikit-learn); or name another one with"
            " --dataset"
        ) from None
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) * (255 / 16)
    images = (
        F.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False)
        .round()
        .to(torch.uint8)
        .expand(-1, 3, 32, 32)
    )
    labels = torch.from_numpy(digits.target).to(torch.int64)
    train, test = (images[:-TEST], labels[:-TEST]), (images[-TEST:], labels[-TEST:])
    return Dataset("digits", 10, (0.3053,) * 3, (0.3228,) * 3, False, *train, *test)
