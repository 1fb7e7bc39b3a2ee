"""``--dry-run``: one step of a run, its features, memory and time. Nothing is written."""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from fastkd.io.console import counted
from fastkd.methods.context import shapes
from fastkd.models.observed import shows_features
from fastkd.seeds import seeded
from fastkd.several_teachers import SeveralTeachers
from fastkd.training.config import Config
from fastkd.training.device import determinism
from fastkd.training.phases import phase_trainer
from fastkd.training.progress import Progress, clock
from fastkd.training.step import after_each
from fastkd.training.trainer import Trainer

STEPS = 3
"""Steps that are made; all but the first, which warms up, are timed."""


def trial(config: Config) -> str:
    """A few training steps on the set's images, by an untrained teacher, and what they take."""
    with seeded(config.seed_of("teacher"), "teacher", "weights"):
        teacher = config.new_teacher() if config.method.needs_teacher else None
    phase = config.phases(config.method)[-1]
    with determinism(config.settings.deterministic):
        student, batches = config.new_model("student"), config.batches("student")
        trainer = phase_trainer(config, "student", phase, student, teacher, batches)
        steps, last = list[float](), time.perf_counter()
        running = after_each(trainer.train_steps(1, Progress("dry run", trainer.steps, silent=True)))
        for _ in zip(range(STEPS), running, strict=False):
            _wait(config.device)
            steps.append(time.perf_counter() - last - trainer.train_step.compiling * (not steps))
            last = time.perf_counter()
    timed = steps[1:] or steps
    step = sum(timed) / len(timed)
    epoch = step * len(trainer.batches)
    memory = _memory(config.device) / 2**20
    what = "of tensors on the GPU" if config.device.type == "cuda" else "of this process"
    figures = f"{step * 1000:.0f} ms, of which the last {len(timed)} of {len(steps)} were timed"
    rest = f"an epoch's {len(trainer.batches)} steps {clock(epoch)}, {counted(config.recipe.epochs, 'epoch')}"
    lines = [
        *(("features", text) for text in features(trainer)),
        ("memory", f"{memory:,.0f} MiB, the peak {what}" if memory else "unknown on this system"),
        ("step", f"{figures}; {rest} {clock(epoch * config.recipe.epochs)}, tests and teacher aside"),
        ("dry run", "nothing was written"),
    ]
    return "\n".join(f"{name:<9}{text}" for name, text in lines)


def features(trainer: Trainer) -> list[str]:
    """The sizes of each network's stages and of its pooled vector, a line a network."""
    made: Any = trainer.distillation
    parts = made.parts if isinstance(made, SeveralTeachers) else (made,)
    both: list[tuple[str, Any, Any, tuple[int, ...]]] = [
        ("student", trainer.student, parts[0].views[0], made.image_shape),
        *(("teacher", part.teacher, part.views[1], made.teacher_image_shape) for part in parts),
    ]
    lines = []
    for role, network, view, image_shape in both:
        if network is None or (view is None and not shows_features(network)):
            continue
        found = shapes(network, image_shape, view)[0]
        names = [str(point) for point in view.names] if view is not None else []
        sizes = ["×".join(map(str, size)) for size in found.stages]
        named = [" ".join(filter(None, pair)) for pair in zip(names or [""] * len(sizes), sizes, strict=True)]
        pooled = f"; pooled {found.pooled[0]}" if isinstance(found.pooled, tuple) else ""
        lines.append(f"{role}: {', '.join(named) or 'no points'}{pooled}")
    return lines


def _memory(device: torch.device) -> int:
    """The most bytes in use so far, of a GPU's tensors or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if os.uname().sysname == "Darwin" else 1024
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
