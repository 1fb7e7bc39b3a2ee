"""One of several processes of test_distributed.py: the command on a part of the digits, or a loop whose
result is written to a file.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from support_data import small_digits

from fastkd.distillation import Distillation
from fastkd.methods import Definition, define
from fastkd.models import create_model
from fastkd.models.folding import fold_for_inference
from fastkd.training import Batches, Trainer, distributed, get_recipe, run_dir
from fastkd.training.progress import Progress


def loop(method: str | Definition, alone: bool = False, **fields: Any) -> Trainer:
    """Two epochs of a student without batch norms, whose result is to depend on the images alone; the last
    batch has only 9 of them.

    In float64, but for the cross-entropy, so that what differs is no rounding that grew.
    ``alone``: without cross-entropy; ``fields``: of the recipe, in place of these.
    """
    torch.manual_seed(7)
    rank, world = distributed.share()
    images, labels = torch.randint(0, 256, (57, 3, 32, 32), dtype=torch.uint8), torch.arange(57) % 10
    batches = Batches(
        images,
        labels,
        (0.5,) * 3,
        (0.25,) * 3,
        batch_size=16 // world,
        share=(rank, world),
        dtype=torch.float64,
    )
    recipe = get_recipe("repdistiller", {"epochs": 2, "batch_size": 16 // world, "lr": 0.01, **fields})
    networks = create_model("resnet8"), create_model("resnet8")
    student, teacher = (
        fold_for_inference(networks[0], True).double().requires_grad_(True),
        networks[1].double(),
    )
    terms = define(method, preset="repdistiller") if isinstance(method, str) else method
    distillation = Distillation(
        student, teacher, terms.initialization() if alone else terms, train_labels=labels
    )
    made = Trainer(distillation, batches, batches, recipe, torch.autocast("cpu", enabled=False))
    for epoch in range(1, recipe.epochs + 1):
        made.train_epoch(epoch, Progress("", made.steps))
    return made


def main() -> None:
    what, *rest = sys.argv[1:]
    if what == "loop":
        with distributed.group("cpu"):
            for method in ("at+kd", "fsp"):
                made = loop(method)
                torch.save(
                    {"model": made.student.state_dict(), "history": made.history},
                    f"{rest[0]}-{method}-{distributed.share()[0]}.pt",
                )
        print("threads:", *(name.read_text().strip() for name in Path("/proc/self/task").glob("*/comm")))
        return
    small_digits()
    moment = os.environ.get("DIE_AFTER")
    # killed, or stopped, after so many epochs of the student
    if moment and os.environ.get("LOCAL_RANK") == "0":
        saved = run_dir.save

        def save(path: Path, content: dict) -> None:
            saved(path, content)
            if (
                path.name == "last.pt"
                and content["config"]["trained"] != "teacher"
                and content["epoch"] == int(moment)
            ):
                os.kill(os.getpid(), getattr(signal, os.environ["DIE_BY"]))

        run_dir.save = save
    sys.exit(runpy.run_path(str(Path(__file__).resolve().parents[2] / "train.py"))["main"](rest))


if __name__ == "__main__":
    main()
