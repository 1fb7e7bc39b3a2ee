"""What a method makes of a batch, by one process or its part of it by one of several."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fastkd.distillation import Distillation
from fastkd.methods import METHODS, define
from fastkd.models import create_model
from fastkd.training import collectives, distributed

NAMES = (*METHODS[1:], "ofd.margin=batch", "crd.negatives=queue", "crd.negatives=batch")
TOGETHER = 12  # images of a step
LABELS = torch.arange(30) % 5


def built(name: str, images: int) -> Distillation:
    """In float64, without cross-entropy; batch norms in eval mode, since theirs are means of a process."""
    method, *words = (name.split(".")[0], name) if "." in name else (name,)
    words += {"crd": ["crd.k=7"], "crd.negatives=queue": ["crd.queue=20"]}.get(name, [])
    torch.manual_seed(5)
    student, teacher = create_model("resnet8", 5), create_model("resnet8", 5)
    terms = dataclasses.replace(define(method, preset="repdistiller", words=words), ce=0.0)
    made = Distillation(student, teacher, terms, train_labels=LABELS, batch_size=images, epochs=240)
    made = made.double().train()
    for module in made.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    made.set_epoch(30, 240)  # no schedule begins at 0 there
    return made


def step(made: Distillation, rows: Tensor, together: int) -> dict[str, Tensor]:
    """Gradients by name, summed over the processes. Nothing is trained, but the banks move."""
    torch.manual_seed(6)
    images = torch.randn(TOGETHER, 3, 32, 32, dtype=torch.float64)
    names = {name: parameter for name, parameter in made.named_parameters() if parameter.requires_grad}
    made.zero_grad()
    index = 2 * rows + 1
    losses = made(images[rows], LABELS[index], index)
    losses.total.backward()
    collectives.add_gradients([*names.values()], len(rows) / together)
    if losses.records:
        made.update(*collectives.joined_rows((index, losses.records), together))
    return {name: parameter.grad.clone() for name, parameter in names.items() if parameter.grad is not None}


def two_steps(name: str, rows: Tensor, together: int) -> dict[str, Any]:
    """Of a method's own batch: the second step meets the banks that the first one left."""
    made = built(name, len(rows))
    return {
        "first": step(made, rows, together),
        "second": step(made, rows, together),
        "buffers": dict(made.methods.named_buffers()),
    }


def every_method(path: str) -> None:
    """The same by each of several processes, of its part of the images."""
    with distributed.group("cpu"):
        rank, world = distributed.share()
        rows = torch.arange(TOGETHER).tensor_split(world)[rank]
        torch.save({name: two_steps(name, rows, TOGETHER) for name in NAMES}, f"{path}-{rank}.pt")
