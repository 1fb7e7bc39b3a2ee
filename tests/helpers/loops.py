"""A small training loop, eager, compiled or replayed."""

from __future__ import annotations

import torch

from fastkd.distillation import Distillation
from fastkd.methods import define
from fastkd.models import create_model
from fastkd.training import Batches, Trainer, get_recipe
from fastkd.training.progress import Progress


def lively(name):
    """A model whose batch norms are not the identity."""
    model = create_model(name).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor, low in (
                (module.running_mean, -1),
                (module.running_var, 0.5),
                (module.weight, 0.5),
                (module.bias, -1),
            ):
                tensor.data.uniform_(low, 1.5)
    return model


def loop_of(method, dtype=torch.float32, count=70, **options):
    torch.manual_seed(5)
    whole = define(method).whole_batches
    images, labels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8), torch.arange(count) % 10
    batches = Batches(images, labels, (0.5,) * 3, (0.25,) * 3, batch_size=8, dtype=dtype, drop_last=whole)
    # rates that float32 holds exactly, as a graph's rate is one
    fields = {
        "epochs": 2,
        "batch_size": 8,
        "lr": 0.0625,
        "gamma": 0.5,
        "new_optimizer": True,
        "milestones": (0.3, 0.6),
    }
    recipe = get_recipe("repdistiller", fields)
    student, teacher = create_model("resnet8"), lively("resnet8")
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    rest = {"train_labels": labels, "batch_size": 8, "epochs": 2}
    if "semckd" in method:  # whose published weight is for larger batches
        rest["options"] = {"semckd": {"beta": 4.0}}
    distillation = Distillation(student, teacher, method, preset="repdistiller", autocast=autocast, **rest)
    return Trainer(distillation, batches, batches, recipe, autocast, **options)


def trained(loop, epochs=(1, 2)):
    for epoch in epochs:
        loop.train_epoch(epoch, Progress("", loop.steps))
    return loop
