"""Distillations of small networks, and a batch for them."""

from __future__ import annotations

import torch
from toy_methods import define

import fastkd
from fastkd.methods import METHODS
from fastkd.models import create_model


def networks(student="resnet8", teacher="resnet8", dtype=torch.float32):
    torch.manual_seed(3)
    return [create_model(name, 7).to(dtype) for name in (student, teacher)]


def batch(n=4, dtype=torch.float32):
    return torch.randn(n, 3, 32, 32, dtype=dtype), torch.arange(n) % 7, torch.tensor([5, 0, 3, 8, 1, 2])[:n]


def distillation_of(name, pair=None, **options):
    if {*name.split("+")} <= {*METHODS}:
        words = ["ce.weight=1", "kd.weight=1"] if name.count("+") > 1 else []
        method = fastkd.methods.define(name, preset="repdistiller" if words else None, words=words)
    else:
        method = define(name, words=["ce.weight=1"])
    options = {"train_labels": torch.arange(9) % 7, "batch_size": 4, "epochs": 10, **options}
    return fastkd.Distillation(*(pair or networks()), method, **options)
