"""The arguments of :class:`fastkd.Distillation`, and labels and indices of a batch's images."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastkd.checks.numbers import whole
from fastkd.checks.tensors import describe


def distillation(
    student: object,
    teacher: object,
    *,
    classifier: object = None,
    image_shape: object = None,
    teacher_image_shape: object = None,
    autocast: object = None,
    teacher_mode: object = "eval",
    seed: object = 0,
    **counts: object,
) -> None:
    """The kinds of the arguments, and that no number is too small. ``counts``: whole numbers from 1 on, or
    None.
    """
    for name, network in (("student", student), ("teacher", teacher)):
        if not isinstance(network, nn.Module) and not (name == "teacher" and network is None):
            several = " (SeveralTeachers takes a list)" * (
                name == "teacher" and isinstance(network, (list, tuple))
            )
            raise TypeError(f"{name} is {type(network).__name__}, wanted a torch.nn.Module{several}")
    if teacher is student:  # it would be frozen
        raise ValueError("teacher is the student itself, wanted a network of its own, such as a copy")
    if isinstance(student, nn.Module) and isinstance(teacher, nn.Module):
        theirs = {id(parameter) for parameter in teacher.parameters()}
        for name, parameter in student.named_parameters():
            if parameter.requires_grad and id(parameter) in theirs:  # freezing the teacher would freeze it
                raise ValueError(
                    f"teacher holds the student's parameter {name}, wanted a network of its own, such as a"
                    " copy"
                )
    pair = classifier if isinstance(classifier, tuple) else (classifier, classifier)
    if len(pair) != 2 or not all(name is None or isinstance(name, str) for name in pair):
        raise TypeError(f"classifier is {classifier!r}, wanted the name of a submodule, or a pair of them")
    for name, shape in (("image_shape", image_shape), ("teacher_image_shape", teacher_image_shape)):
        if shape is not None and not (isinstance(shape, Sequence) and all(map(whole, shape))):
            raise TypeError(f"{name} is {shape!r}, wanted (C, H, W)")
        if shape is not None and (len(shape) < 2 or min(shape) < 1):
            raise ValueError(f"{name} is {shape!r}, wanted (C, H, W), each at least 1")
    if autocast is not None and not isinstance(autocast, torch.autocast):
        raise TypeError(f"autocast is {autocast!r}, wanted a torch.autocast or None")
    if teacher_mode not in ("eval", "train"):
        raise ValueError(f"teacher_mode is {teacher_mode!r}, wanted 'eval' or 'train'")
    if not whole(seed):
        raise TypeError(f"seed is {seed!r}, wanted a whole number")
    for name, count in counts.items():
        if count is None:
            continue
        if not whole(count):
            raise TypeError(f"{name} is {count!r}, wanted a whole number")
        if operator.index(count) < 1:  # type: ignore[arg-type]
            raise ValueError(f"{name} is {count}, wanted at least 1")


def epoch_of(epoch: object, epochs: object) -> tuple[int, int]:
    """``epoch``, from 0 to ``epochs - 1``, and ``epochs``, both as Python integers."""
    for name, count in (("epoch", epoch), ("epochs", epochs)):
        if not whole(count):
            raise TypeError(f"{name} is {count!r}, wanted a whole number")
    which, count = operator.index(epoch), operator.index(epochs)  # type: ignore[arg-type]
    if not 0 <= which < count:
        raise ValueError(f"epoch is {which} of {count}, wanted one from 0 to epochs - 1")
    return which, count


def image_numbers(name: str, value: object, count: int | None = None) -> Tensor:
    """Labels or indices of images: (N,) int64, with N = ``count`` where that is given."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {type(value).__name__}, wanted a tensor (N,) of int64")
    if value.dtype != torch.int64:
        raise TypeError(f"{name} is {describe(value)}, wanted int64")
    if value.dim() != 1 or count not in (None, len(value)):
        raise ValueError(f"{name} is {describe(value)}, wanted ({'N' if count is None else count},)")
    return value


def train_labels(value: object) -> Tensor:
    """The labels of the training set: (M,) int64, none below 0."""
    labels = image_numbers("train_labels", value)
    least = int(labels.min()) if len(labels) else 0
    if least < 0:
        raise ValueError(f"train_labels has {least}, wanted classes from 0 on")
    return labels


IGNORED = -100
"""The label that PyTorch's cross-entropy leaves out."""


def label_values(labels: Tensor, classes: int) -> None:
    """Raises ValueError unless the labels (N,) are classes or ``IGNORED``. Probabilities are not checked,
    nor labels on a GPU, which the host would have to wait for.
    """
    if labels.is_floating_point() or labels.device.type != "cpu" or not labels.numel():
        return
    least, most = (int(x) for x in labels.aminmax())
    if least < 0 or most >= classes:
        wrong = labels[((labels < 0) & (labels != IGNORED)) | (labels >= classes)]
        if len(wrong):
            raise ValueError(f"labels has {int(wrong[0])}, wanted 0 to {classes - 1}, or {IGNORED} for none")
