"""Draws the attention maps of finished runs again, from their weights.

python -m fastkd.report.maps runs/FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fastkd import plugins
from fastkd.data import load_dataset
from fastkd.errors import UserError
from fastkd.io.arguments import OneLineParser
from fastkd.io.console import screens
from fastkd.io.files import as_path
from fastkd.models import WeightsError, create_model, load_student, load_weights
from fastkd.training import attention_maps
from fastkd.training.device import find_device
from fastkd.training.evaluation import placed
from fastkd.training.recipes import normalization_of
from fastkd.training.teacher_images import SAME, parsed


def redraw(folder: Path, data: Path | None) -> list[Path]:
    """Draws the pictures of the student's run in ``folder`` from its files, and returns their paths. Raises
    UserError.
    """
    try:
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} holds no run: config.json: {getattr(error, 'strerror', None) or error}"
        ) from None
    try:
        report, constants, epochs = (about["fields"][key] for key in ("report", "normalization", "epochs"))
        names = ("method", "dataset", "data", "teacher", "teacher_checkpoint")
        method, name, root, taught_by, checkpoint = (about[key] for key in names)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{folder} holds no run of this version: config.json ({type(error).__name__}: {error})"
        ) from None
    if about.get("trained") == "teacher":
        raise UserError(f"{folder} is the run of a teacher, wanted a student's: its pictures show both")
    # what is looked for by get, here and below, runs of older versions do not have
    for file in about.get("plugins") or ():
        plugins.load(file)
    dataset = load_dataset(name, data or root)
    own = normalization_of(constants, dataset)
    theirs = parsed((about.get("teacher_normalization") or (SAME,))[0]) or own
    device, teacher = find_device(None), None
    row = {**about, "dataset": dataset.title, "nepoch": epochs}
    try:
        student = load_student(folder, file="best.pt" if report == "best" else "last.pt")
        if method == "baseline":
            row["teacher"] = ""
        else:
            trained = folder.parent / "teachers" / about.get("teacher_file", "")
            teacher = create_model(taught_by, dataset.classes)
            load_weights(teacher, checkpoint or trained)
    except WeightsError as error:
        raise UserError(str(error)) from None
    networks = placed(student, device), None if teacher is None else placed(teacher, device)
    points, sides = about.get("points", (None, None)), about.get("sides", (32, 32))
    return attention_maps.draw(folder, row, dataset, (own, theirs), *networks, points, sides)


@screens()
def main(arguments: list[str] | None = None) -> int:
    text = "Attention maps of finished runs."
    parser = OneLineParser(prog="python -m fastkd.report.maps", description=text, allow_abbrev=False)
    parser.add_argument(
        "folders", nargs="+", type=as_path, metavar="FOLDER", help="of a run: runs/at-cifar10-..."
    )
    parser.add_argument(
        "--data", type=as_path, metavar="DIR", help="where the set lies now, if not where the run found it"
    )
    flags = parser.parse_args(arguments)
    try:
        if not attention_maps.available():
            raise UserError("pictures take matplotlib (pip install matplotlib)")
        for folder in flags.folders:
            for path in redraw(folder, flags.data):
                print(path)
    except UserError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
