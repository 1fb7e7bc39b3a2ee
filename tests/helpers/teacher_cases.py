"""A teacher with statistics as training leaves them, and the same in each of two processes."""

from __future__ import annotations

import torch
from plain_networks import Foreign
from torch import nn

import fastkd
from fastkd.models import create_model
from fastkd.training import distributed

MEAN, VARIANCE, STEPS = 5.0, 2.0, 7


def statistics(network):
    """(running mean, running variance, batches seen) of all batch norms, each as the set of its values."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    return [
        {value for norm in norms for value in getattr(norm, name).flatten().tolist()}
        for name in ("running_mean", "running_var", "num_batches_tracked")
    ]


def seen_much(network, mean=MEAN):
    """The network, whose batch norms have other statistics than new ones."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.fill_(mean)
            module.running_var.fill_(VARIANCE)
            module.num_batches_tracked.fill_(STEPS)
    return network


def distillation_of(foreign, mean=MEAN):
    torch.manual_seed(3)
    student, teacher = (Foreign(7) if foreign else create_model("resnet8", 7) for _ in range(2))
    points = {f"{role}_points": ["layer1", "layer2"] for role in ("student", "teacher")} if foreign else {}
    return fastkd.Distillation(student, seen_much(teacher, mean), "at+kd", **points)


def buffers_of_processes(path: str) -> None:
    """A step under DistributedDataParallel, which sends the first process's buffers to all of them."""
    with distributed.group("cpu"):
        rank = distributed.share()[0]
        found = {}
        for foreign in (False, True):
            made = distillation_of(foreign, MEAN + rank)
            made.student.bn1.running_mean.fill_(float(rank))
            parallel = nn.parallel.DistributedDataParallel(made)
            parallel.eval()  # or the batch would change what the first process has sent
            with torch.no_grad():
                parallel(torch.zeros(2, 3, 32, 32), torch.arange(2))
            parallel.train()
            parallel(torch.zeros(2, 3, 32, 32), torch.arange(2)).total.backward()
            found[foreign] = [statistics(made.teacher)[0], made.student.bn1.running_mean.unique().tolist()]
        torch.save(found, f"{path}-{rank}.pt")
