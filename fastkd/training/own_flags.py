"""The flags that name networks, fastkd's and any other, and those for a folder of images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastkd import models, plugins
from fastkd.errors import UserError
from fastkd.io.arguments import whole
from fastkd.io.console import counted
from fastkd.models.specs import FORMS, is_spec
from fastkd.training.teacher_images import FORM, for_each, parsed, written


def add_networks(parser: argparse.ArgumentParser) -> None:
    known = f"default resnet20; known: {', '.join(_models())}, and {FORMS}"
    several = "; repeated, each with its checkpoint, for several teachers"
    parser.add_argument("--teacher", type=model_name, action="append", metavar="NAME", help=known + several)
    parser.add_argument(
        "--student", type=model_name, metavar="NAME", help="default resnet20; as for the teacher"
    )
    weights = "the teacher's weights, under RepDistiller's names; once per --teacher"
    parser.add_argument("--teacher-checkpoint", type=Path, action="append", metavar="FILE", help=weights)
    mean = "with several teachers, take the mean of the losses (default) or, for kd and dkd, of the logits"
    parser.add_argument("--join-teachers", choices=("losses", "logits"), help=mean)


def _models() -> list[str]:
    """Names of models, those that others have registered or their packages offer among them."""
    return list(dict.fromkeys([*models.MODELS, *plugins.known("model")]))


def all_teachers(
    names: list[str] | None, files: list[Path] | None, points: list[tuple[str, ...]] | None = None
) -> dict[str, Any]:
    """What ``Settings`` says of ``--teacher``, ``--teacher-checkpoint`` and ``--teacher-points``, each given
    as often as there are teachers; one name, or one list of points, is that of all. Raises UserError.
    """
    found = _named(names or [], files or [])
    if points:
        each = for_each("--teacher-points", tuple(points), 1 + len(found.get("more_teachers", ())))
        found |= {"teacher_points": each[0], "more_points": tuple(each[1:]) if len(points) > 1 else None}
    return found


def _named(names: list[str], files: list[Path]) -> dict[str, Any]:
    if len(names) == 1 < len(files):
        names = names * len(files)
    if max(len(names), len(files)) < 2:
        return {"teacher": next(iter(names), None), "teacher_checkpoint": next(iter(files), None)}
    if len(names) != len(files):
        raise UserError(
            f"--teacher is given {counted(len(names), 'time')}, --teacher-checkpoint"
            f" {counted(len(files), 'time')}: of several teachers each wants a checkpoint"
        )
    more = tuple(zip(names[1:], files[1:], strict=True))
    return {"teacher": names[0], "teacher_checkpoint": files[0], "more_teachers": more}


def add_own(group: argparse._ArgumentGroup) -> None:
    """Flags for networks other than fastkd's own, and for a folder of images."""
    points = "names of submodules, in the order of the forward pass: layer2,layer3,layer4"
    group.add_argument(
        "--teacher-points",
        type=names,
        action="append",
        metavar="A,B,...",
        help=f"{points}; with several teachers for all of them, or once per teacher",
    )
    group.add_argument("--student-points", type=names, metavar="A,B,...", help="as for the teacher")
    group.add_argument(
        "--image-size", type=whole, metavar="N", help="side of a folder's images (default: 224)"
    )
    wants = f"how a --teacher-checkpoint's images were normalized: {FORM}; default: what it declares"
    group.add_argument(
        "--teacher-normalization", type=normalization, action=Tuple, metavar="MEAN/STD", help=wants
    )
    for role in ("teacher", "student"):
        text = f"side of the {role}'s images; crop and flip are the same for both networks"
        group.add_argument(f"--{role}-size", type=whole, metavar="N", help=text)
    group.add_argument("--workers", type=whole, metavar="N", help="processes that read a folder's images")
    bad = "a damaged file ends the run (stop, default), or is named and left out (skip)"
    group.add_argument("--on-bad-image", choices=("stop", "skip"), help=bad)


def names(text: str) -> tuple[str, ...]:
    """The names in "layer1,layer2"."""
    found = tuple(part.strip() for part in text.split(","))
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name, wanted names with commas between them")
    again = next((name for i, name in enumerate(found) if name in found[:i]), None)
    if again is not None:
        raise argparse.ArgumentTypeError(f"{text!r} has {again} twice, wanted each submodule once")
    return found


class Tuple(argparse.Action):
    """A flag that may be given several times, as a tuple."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        setattr(namespace, self.dest, (*(getattr(namespace, self.dest) or ()), values))


def normalization(text: str) -> str:
    try:
        return written(parsed(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def model_name(text: str) -> str:
    if text not in _models() and not is_spec(text):
        known = ", ".join(map(repr, _models()))
        raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from {known}, or {FORMS})")
    return text
