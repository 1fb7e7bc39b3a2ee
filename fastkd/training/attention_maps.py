"""Sheets of attention maps: some test images, and what teacher and student look at in each stage.

Drawn as one array of pixels with matplotlib's lettering around it, which takes a fraction of the time of an
axis a map.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.data.feed import AnyDataset
from fastkd.errors import UserError, one_line
from fastkd.io import figures
from fastkd.io.files import write
from fastkd.models.normalization import Normalization
from fastkd.training.examples import examples, normalized, stages
from fastkd.training.groups import described

# file's stem: (what the map is, the map of features (N, C, H, W), what else the reader should know)
VARIANTS: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "maps-mean-of-squares": ("Mean over channels of x²", lambda x: x.square().mean(1), ""),
    "maps-sum-of-squares": (
        "Sum over channels of x²",
        lambda x: x.square().sum(1),
        " The mean times the channels: the same colours.",
    ),
    "maps-plain-sum": ("Sum over channels of x", lambda x: x.sum(1), ""),
}
CELL, GAP, GROUP = 120, 5, 18  # pixels: a picture, between two, between stages
UNSIGNED = "Each map from 0 (dark) to its own largest value (bright), over the grey image."
SIGNED = "Each map from minus (blue) to plus (red) its own largest magnitude, over the brightened grey image."
SHARE = 0.65  # of the heat map, the rest is the image


def available() -> bool:
    return find_spec("matplotlib") is not None


def draw(
    folder: Path,
    about: Mapping[str, Any],
    data: AnyDataset,
    normalizations: Sequence[Normalization],
    student: nn.Module,
    teacher: nn.Module | None,
    points: Sequence[Sequence[str] | None] = (None, None),
    sides: Sequence[int] = (32, 32),
) -> list[Path]:
    """Writes the sheets of a run into its folder, one a variant, and returns their paths.

    ``about``: method, dataset, student, teacher and nepoch, as in the table. ``normalizations``, ``points``,
    ``sides``: of the student and of the teacher, (mean, std), their stages and the size of a folder's images.
    Models are left in eval mode. Raises UserError, one line, whatever matplotlib or the disk say.
    """
    try:
        models = {"student": (student, points[0], sides[0], normalizations[0])}
        if teacher is not None:
            models = {"teacher": (teacher, points[1], sides[1], normalizations[1]), **models}
        features = {}
        for name, (model, names, side, normalization) in models.items():
            images, labels = examples(data, side)  # the student's are the last, and are drawn
            features[name] = stages(model, normalized(images, normalization, model), names)
        title, paths = described(about), []
        for stem, (formula, reduce, remark) in VARIANTS.items():
            maps = {name: [reduce(x) for x in found] for name, found in features.items()}
            write(folder / f"{stem}.png", sheet(images, labels, maps, formula, title, remark))
            paths.append(folder / f"{stem}.png")
        return paths
    except Exception as error:
        raise UserError(f"pictures: none ({one_line(error) or type(error).__name__})") from None


def sheet(
    images: Tensor,
    labels: Sequence[str],
    maps: dict[str, list[Tensor]],
    formula: str,
    title: str,
    remark: str,
) -> bytes:
    """A PNG. ``images`` (N, 3, H, W) uint8; ``maps`` by model: one (N, h, w) a stage.

    Columns: the image, then each stage with its models side by side. A map goes from 0, or from minus where
    any has negative values, to its own largest magnitude.
    """
    figure_class = figures.figure_class()
    from matplotlib import colormaps

    count, names, number = len(images), list(maps), len(next(iter(maps.values())))
    signed = any(bool((found < 0).any()) for stages in maps.values() for found in stages)
    picture = enlarged(images.float() / 255)
    grey = picture.mean(1, keepdim=True).expand_as(picture)
    grey = (1 + grey) / 2 if signed else grey  # 0 is white there, and black behind it would make it grey
    columns, places, x = [picture], [0], CELL
    for stage in range(number):
        x += GROUP
        for name in names:
            colour = heat(maps[name][stage], signed, colormaps)
            columns.append(SHARE * colour + (1 - SHARE) * grey)
            places.append(x)
            x += CELL + GAP
        x -= GAP
    width, height = x, count * (CELL + GAP) - GAP
    canvas = torch.ones(height, width, 3)
    for place, column in zip(places, columns, strict=True):
        for row in range(count):
            top = row * (CELL + GAP)
            canvas[top : top + CELL, place : place + CELL] = column[row].permute(1, 2, 0)

    dpi, left, above = 150, 34, 106
    about = textwrap.wrap((SIGNED if signed else UNSIGNED) + remark, width // 9)
    below = 12 + 20 * len(about)
    figure = figure_class(((width + left + 4) / dpi, (height + above + below) / dpi), dpi=dpi)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(-left, width + 4)
    axes.set_ylim(height + below, -above)
    axes.set_axis_off()
    axes.imshow(
        canvas.clamp(0, 1).numpy(), extent=(0, width, height, 0), interpolation="nearest", aspect="auto"
    )
    text: dict[str, Any] = {"ha": "center", "va": "center"}
    axes.text(0, -above + 14, formula, ha="left", va="center", fontsize=8.5, weight="bold")
    axes.text(0, -above + 36, title, ha="left", va="center", fontsize=7.5)
    axes.text(CELL / 2, -14, "image", fontsize=7.5, **text)
    for i, place in enumerate(places[1:]):
        word = names[i % len(names)] if len(names) > 1 else size(maps[names[0]][i])
        axes.text(place + CELL / 2, -14, word, fontsize=7.5, **text)
    for stage in range(number):
        first, last = places[1 + stage * len(names)], places[(stage + 1) * len(names)] + CELL
        word = f"stage {stage + 1}" + f" ({size(maps[names[0]][stage])})" * (len(names) > 1)
        axes.text((first + last) / 2, -42, word, fontsize=8, **text)
        axes.plot([first, last], [-29, -29], color="black", linewidth=0.6)
    for row, label in enumerate(labels):
        axes.text(-12, row * (CELL + GAP) + CELL / 2, label, fontsize=8, rotation=90, **text)
    for i, line in enumerate(about):
        axes.text(0, height + 18 + 20 * i, line, ha="left", va="center", fontsize=7)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def enlarged(pictures: Tensor) -> Tensor:
    """(N, C, h, w) at the size of a cell."""
    return F.interpolate(pictures, size=(CELL, CELL), mode="bicubic", align_corners=False)


def size(found: Tensor) -> str:
    return "×".join(map(str, found.shape[-2:]))


def heat(found: Tensor, signed: bool, colormaps: Any) -> Tensor:
    """Colours (N, 3, CELL, CELL) of maps (N, h, w)."""
    top = found.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    level = enlarged((found / top)[:, None])[:, 0]
    level = level / 2 + 0.5 if signed else level
    colour = colormaps["RdBu_r" if signed else "inferno"](level.clamp(0, 1).numpy())[..., :3]
    return torch.from_numpy(colour).float().permute(0, 3, 1, 2)
