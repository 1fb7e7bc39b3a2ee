"""Misuse of tap and relu_tap is told in one sentence."""

from __future__ import annotations

import re

import pytest
import torch
import torch.utils.checkpoint

import fastkd

pytestmark = pytest.mark.usefixtures("one_thread")


def f(*shape, dtype=torch.float32, device="cpu"):
    return torch.ones(shape, dtype=dtype, device=device)


AT = fastkd.attention_transfer_loss
MISUSE = {
    "tap of integers": (lambda: fastkd.tap(f(2, 3, 4, dtype=torch.int64)), TypeError, ["x is", "int64"]),
    "tap of two dimensions": (lambda: fastkd.tap(f(2, 3)), ValueError, ["x is", "dimensions"]),
    "tap with a power below one": (lambda: fastkd.tap(f(2, 3, 4), 0.5), ValueError, ["p is 0.5"]),
    "tap with an unknown eps_mode": (
        lambda: fastkd.tap(f(2, 3, 4), eps_mode="max"),
        ValueError,
        ["eps_mode", "clamp", "add"],
    ),
    "relu_tap of a list": (lambda: fastkd.relu_tap([1.0]), TypeError, ["x is list"]),
    "relu_tap of an empty batch": (lambda: fastkd.relu_tap(f(0, 3, 4)), ValueError, ["x is", "batch"]),
    "residual a number": (
        lambda: fastkd.relu_tap(f(2, 3, 4), 1.0),
        TypeError,
        ["residual is float", "tensor"],
    ),
    "residual of another shape": (
        lambda: fastkd.relu_tap(f(2, 3, 4), f(2, 1, 4)),
        ValueError,
        ["residual is", r"\(2, 1, 4\)", "shape"],
    ),
    "residual of another dtype": (
        lambda: fastkd.relu_tap(f(2, 3, 4), f(2, 3, 4).half()),
        TypeError,
        ["residual is", "float16", "dtypes"],
    ),
    "residual elsewhere": (
        lambda: fastkd.relu_tap(f(2, 3, 4), f(2, 3, 4, device="meta")),
        ValueError,
        ["residual is", "meta", "device"],
    ),
    "relu_tap with unknown channel_reduce": (
        lambda: fastkd.relu_tap(f(2, 3, 4), channel_reduce="max"),
        ValueError,
        ["channel_reduce"],
    ),
    "student's map too large": (
        lambda: AT(f(2, 4, 5), f(2, 3, 4, 4), student_is_map=True),
        ValueError,
        [r"student\[0\] is a map"],
    ),
    "maps of different sizes": (
        lambda: AT(f(2, 4, 5), f(2, 4, 4), student_is_map=True, teacher_is_map=True),
        ValueError,
        [r"student\[0\] is a map", "teacher"],
    ),
    "student's map of wrong rank": (
        lambda: AT(f(2, 4), f(2, 3, 4, 4), student_is_map=True),
        ValueError,
        ["student", "dimensions"],
    ),
}


@pytest.mark.parametrize("backend", ["reference", "cpp", "auto"])
@pytest.mark.parametrize("misuse", MISUSE)
def test_misuse_is_told_in_one_sentence(misuse, backend):
    call, kind, words = MISUSE[misuse]
    with fastkd.use_backend(backend), pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is kind and "\n" not in message and len(message) < 300, message
    for word in words:
        assert re.search(word, message), f"{word!r} is not in: {message}"
