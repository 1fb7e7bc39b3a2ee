"""Draws the attention maps of finished runs again, from their weights.

python -m fastkd.report.maps runs/FOLDER
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from fastkd.errors import UserError
from fastkd.io.console import screens
from fastkd.io.files import as_path
from fastkd.models import WeightsError, load_weights
from fastkd.training import attention_maps
from fastkd.training.config import Config
from fastkd.training.settings import from_config


def redraw(folder: Path, data: Path | None) -> list[Path]:
    """The pictures of the run in ``folder`` from its files, or one line with the reason. Raises UserError."""
    try:
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} holds no run: config.json: {getattr(error, 'strerror', None) or error}"
        ) from None
    settings = from_config(about, folder.parent)
    config = Config(settings if data is None else dataclasses.replace(settings, data=data))
    paths = {"student": folder / ("best.pt" if config.recipe.report == "best" else "last.pt")}
    if config.method.needs_teacher:
        kept = config.teacher_path()  # of this machine's device; the run's may have been another
        paths["teacher"] = settings.teacher_checkpoint or kept.with_name(about.get("teacher_file", kept.name))
    models = {role: config.new_model(role).to(config.device) for role in paths}
    if config.method.wraps:
        models["student"] = config.distillation(
            "student", models["student"], models["teacher"], config.method, fold=False
        ).student
    try:
        for role, path in paths.items():
            load_weights(models[role], path)
    except WeightsError as error:
        raise UserError(str(error)) from None
    return attention_maps.draw(config, folder, models["student"], models.get("teacher"))


@screens()
def main(arguments: list[str] | None = None) -> int:
    text = "Attention maps of finished runs."
    parser = argparse.ArgumentParser(
        prog="python -m fastkd.report.maps", description=text, allow_abbrev=False
    )
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
        print(f"redraw: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
