"""The flags that name networks, fastkd's and any other, and those for a folder of images."""

from __future__ import annotations

import argparse

from fastkd.models import MODELS
from fastkd.models.specs import FORMS, is_spec


def add_networks(parser: argparse.ArgumentParser) -> None:
    known = f"resnet20; known: {', '.join(MODELS)}, and {FORMS}"
    parser.add_argument("--teacher", type=model_name, metavar="NAME", help=known)
    parser.add_argument("--student", type=model_name, metavar="NAME", help="resnet20; as for the teacher")


def add_own(group: argparse._ArgumentGroup) -> None:
    """Flags for networks that are none of fastkd's, and for a folder of images."""
    points = "names of submodules, in the order of the forward pass: layer2,layer3,layer4"
    group.add_argument("--teacher-points", type=names, metavar="A,B,...", help=points)
    group.add_argument("--student-points", type=names, metavar="A,B,...", help="as for the teacher")
    group.add_argument("--image-size", type=int, metavar="N", help="side of a folder's images (224)")
    for role in ("teacher", "student"):
        text = f"that of the {role}'s images; crop and flip are the same for both"
        group.add_argument(f"--{role}-size", type=int, metavar="N", help=text)
    group.add_argument("--workers", type=int, metavar="N", help="processes that read a folder's images")
    bad = "a file that is no whole image ends the run (stop, default), or is named and left out"
    group.add_argument("--on-bad-image", choices=("stop", "skip"), help=bad)


def names(text: str) -> tuple[str, ...]:
    """The names in "layer1,layer2"."""
    found = tuple(part.strip() for part in text.split(","))
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name, wanted names with commas between them")
    return found


def model_name(text: str) -> str:
    if text not in MODELS and not is_spec(text):
        known = ", ".join(map(repr, MODELS))
        raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from {known}, or {FORMS})")
    return text
