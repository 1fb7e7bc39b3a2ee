"""Misuse: one sentence that names the argument, what was given and what was wanted; of the same type under
every backend.
"""

from __future__ import annotations

import math
import re

import pytest
import torch
from support import cpp_missing

import fastkd

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*nested tensors")]
BACKENDS = [
    "reference",
    pytest.param(
        "cpp", marks=pytest.mark.skipif(bool(cpp_missing()), reason=f"backend cpp: {cpp_missing()}")
    ),
    "auto",
]


def f(*shape, dtype=torch.float32, device="cpu"):
    return torch.ones(shape, dtype=dtype, device=device)


X, AT, FSP = fastkd.attention_map, fastkd.attention_transfer_loss, fastkd.fsp_loss
PAIR = [f(2, 3, 4, 4), f(2, 5, 4, 4)]
# call, wanted type, words of which every one stands in the message
MISUSE = {
    "map of integers": (lambda: X(f(2, 3, 4, dtype=torch.int64)), TypeError, ["x", "int64", "float"]),
    "map of complex numbers": (
        lambda: X(f(2, 3, 4, dtype=torch.complex64)),
        TypeError,
        ["x", "complex64", "float"],
    ),
    "map of bools": (lambda: X(f(2, 3, 4, dtype=torch.bool)), TypeError, ["x", "bool", "float"]),
    "map of float8": (lambda: X(f(2, 3, 4).to(torch.float8_e4m3fn)), TypeError, ["x", "float8_e4m3fn"]),
    "map of a sparse tensor": (
        lambda: X(f(2, 3, 4).to_sparse()),
        TypeError,
        ["x is of layout torch.sparse_coo, wanted a dense tensor"],
    ),
    "map of a oneDNN tensor": (
        lambda: X(f(2, 3, 4, 4).to_mkldnn()),
        TypeError,
        ["x is of layout torch._mkldnn, wanted a dense tensor"],
    ),
    "loss of nested tensors": (
        lambda: AT(torch.nested.nested_tensor([f(3, 4), f(3, 5)]), f(2, 3, 4)),
        TypeError,
        ["student is nested, wanted a dense tensor"],
    ),
    "loss of a sparse teacher": (
        lambda: fastkd.hcl_loss(PAIR, [PAIR[0], PAIR[1].to_sparse()]),
        TypeError,
        [r"teacher\[1\] is of layout torch.sparse_coo, wanted a dense tensor"],
    ),
    "map of a list": (lambda: X([1.0, 2.0]), TypeError, ["x", "list", "tensor"]),
    "map of two dimensions": (lambda: X(f(2, 3)), ValueError, ["x", r"\(2, 3\)", "dimensions"]),
    "map of six dimensions": (
        lambda: X(f(1, 1, 1, 1, 1, 1)),
        ValueError,
        ["x", r"\(1, 1, 1, 1, 1, 1\)", "dimensions"],
    ),
    "map of an empty batch": (lambda: X(f(0, 3, 4)), ValueError, ["x", r"\(0, 3, 4\)", "batch"]),
    "map of zero channels": (lambda: X(f(2, 0, 4)), ValueError, ["x", r"\(2, 0, 4\)", "channels"]),
    "map of zero positions": (lambda: X(f(2, 3, 4, 0)), ValueError, ["x", r"\(2, 3, 4, 0\)", "positions"]),
    "power below one": (lambda: X(f(2, 3, 4), 0.99), ValueError, ["p", "0.99", "1"]),
    "power infinite": (lambda: X(f(2, 3, 4), math.inf), ValueError, ["p", "inf", "finite"]),
    "power NaN": (lambda: X(f(2, 3, 4), math.nan), ValueError, ["p", "nan", "finite"]),
    "power that may be a weight": (
        lambda: X(f(2, 3, 4), 1000.0),
        ValueError,
        ["p", "1000.0", "16", "weight="],
    ),
    "weight in the place of p": (lambda: AT(*PAIR, 1000.0), ValueError, ["p", "1000.0", "16", "weight="]),
    "weight in the place of a tap's p": (
        lambda: fastkd.tap(f(2, 3, 4), 16.5),
        ValueError,
        ["p", "16.5", "weight="],
    ),
    "weight in the place of a ReLU tap's p": (
        lambda: fastkd.relu_tap(f(2, 3, 4), None, 17),
        ValueError,
        ["p", "17", "weight="],
    ),
    "weight in the place of a module's p": (
        lambda: fastkd.AttentionTransfer(1000.0)(*PAIR),
        ValueError,
        ["p", "1000.0", "weight="],
    ),
    "power a string": (lambda: X(f(2, 3, 4), "2"), TypeError, ["p", "2", "number"]),
    "unknown channel_reduce": (
        lambda: X(f(2, 3, 4), channel_reduce="max"),
        ValueError,
        ["channel_reduce", "max", "mean", "sum"],
    ),
    "unknown eps_mode": (
        lambda: X(f(2, 3, 4), eps_mode="max"),
        ValueError,
        ["eps_mode", "max", "clamp", "add"],
    ),
    "loss of integers": (
        lambda: AT(f(2, 3, 4), f(2, 3, 4, dtype=torch.int32)),
        TypeError,
        ["teacher", "int32", "float"],
    ),
    "loss of a number": (lambda: AT(1.0, f(2, 3, 4)), TypeError, ["student", "float", "tensor"]),
    "loss of a None among stages": (
        lambda: AT([f(2, 3, 4), None], [f(2, 3, 4)] * 2),
        TypeError,
        [r"student\[1\]", "NoneType", "tensor"],
    ),
    "loss of two dimensions": (
        lambda: AT(f(2, 3), f(2, 3)),
        ValueError,
        ["student", r"\(2, 3\)", "dimensions"],
    ),
    "batch sizes differ": (
        lambda: AT(PAIR, [f(2, 3, 4, 4), f(3, 5, 4, 4)]),
        ValueError,
        [r"student\[1\]", r"teacher\[1\]", "batch"],
    ),
    "batch sizes of stages differ": (
        lambda: AT([f(2, 3, 4), f(3, 3, 4)], [f(2, 3, 4), f(3, 3, 4)]),
        ValueError,
        [r"student\[0\]", r"student\[1\]", "batch"],
    ),
    "ranks differ": (lambda: AT(f(2, 3, 4, 4), f(2, 3, 4)), ValueError, ["student", "teacher", "dimensions"]),
    "devices differ": (
        lambda: AT(PAIR, [f(2, 3, 4, 4), f(2, 5, 4, 4, device="meta")]),
        ValueError,
        ["student", "teacher", "meta", "device"],
    ),
    "lengths differ": (lambda: AT(PAIR, PAIR[:1]), ValueError, ["student", "2", "teacher", "1"]),
    "empty lists": (lambda: AT([], []), ValueError, ["student", "0", "1"]),
    "empty batch": (lambda: AT(f(0, 3, 4), f(0, 3, 4)), ValueError, ["student", "batch"]),
    "zero channels": (lambda: AT(f(2, 0, 4), f(2, 3, 4)), ValueError, ["student", "channels"]),
    "zero teacher positions": (
        lambda: AT(f(2, 3, 4, 4), f(2, 3, 4, 0)),
        ValueError,
        ["teacher", "positions"],
    ),
    "loss power below one": (lambda: AT(*PAIR, -2), ValueError, ["p", "-2"]),
    "unknown loss channel_reduce": (
        lambda: AT(*PAIR, channel_reduce="x"),
        ValueError,
        ["channel_reduce", "x", "mean"],
    ),
    "unknown loss eps_mode": (lambda: AT(*PAIR, eps_mode="x"), ValueError, ["eps_mode", "x", "clamp"]),
    "unknown pool": (lambda: AT(*PAIR, pool="never"), ValueError, ["pool", "never", "before", "after"]),
    "unknown pool_mode": (lambda: AT(*PAIR, pool_mode="min"), ValueError, ["pool_mode", "min", "avg", "max"]),
    "unknown difference": (
        lambda: AT(*PAIR, difference="l1"),
        ValueError,
        ["difference", "l1", "squared", "l2"],
    ),
    "unknown stage_reduce": (
        lambda: AT(*PAIR, stage_reduce="max"),
        ValueError,
        ["stage_reduce", "max", "sum", "mean"],
    ),
    "too many weights": (lambda: AT(PAIR, PAIR, weights=[1, 2, 3]), ValueError, ["weights", "3", "2"]),
    "weights for one tensor": (lambda: AT(*PAIR, weights=[]), ValueError, ["weights", "0", "1"]),
    "a weight that is no number": (
        lambda: AT(PAIR, PAIR, weights=[1, "a"]),
        TypeError,
        [r"weights\[1\]", "a", "number"],
    ),
    "weight a string": (lambda: AT(*PAIR, weight="heavy"), TypeError, ["weight", "heavy", "number"]),
    "map larger than the student": (
        lambda: AT(f(2, 3, 4, 4), f(2, 4, 5), teacher_is_map=True),
        ValueError,
        ["teacher", "map", "student"],
    ),
    "map of wrong rank": (
        lambda: AT(f(2, 3, 4, 4), f(2, 4), teacher_is_map=True),
        ValueError,
        ["teacher", "dimensions"],
    ),
    "FSP of one stage": (lambda: FSP(PAIR[:1], PAIR[:1]), ValueError, ["student", "1", "2"]),
    "FSP of empty lists": (lambda: FSP([], []), ValueError, ["student", "0", "2"]),
    "FSP of one tensor": (lambda: FSP(PAIR[0], PAIR[0]), ValueError, ["student", "1", "2"]),
    "FSP lengths": (lambda: FSP(PAIR, [*PAIR, PAIR[0]]), ValueError, ["student", "2", "teacher", "3"]),
    "FSP channels": (
        lambda: FSP(PAIR, [PAIR[0], PAIR[0]]),
        ValueError,
        [r"student\[1\]", r"teacher\[1\]", "channels"],
    ),
    "FSP batches": (
        lambda: FSP([PAIR[0], f(3, 5, 4, 4)], [PAIR[0], f(3, 5, 4, 4)]),
        ValueError,
        [r"student\[0\]", r"student\[1\]", "batch"],
    ),
    "FSP integers": (lambda: FSP([PAIR[0], PAIR[1].int()], PAIR), TypeError, [r"student\[1\]", "int32"]),
    "FSP empty batch": (
        lambda: FSP([x[:0] for x in PAIR], [x[:0] for x in PAIR]),
        ValueError,
        ["student", "batch"],
    ),
    "FSP unknown distance": (
        lambda: FSP(PAIR, PAIR, distance="l2"),
        ValueError,
        ["distance", "l2", "squared", "frobenius", "column_l2"],
    ),
    "FSP unknown pair_reduce": (
        lambda: FSP(PAIR, PAIR, pair_reduce="max"),
        ValueError,
        ["pair_reduce", "max", "sum", "mean"],
    ),
    "FSP unknown pool_mode": (
        lambda: FSP(PAIR, PAIR, pool_mode="min"),
        ValueError,
        ["pool_mode", "min", "avg", "max"],
    ),
    "FSP unknown precision": (
        lambda: FSP(PAIR, PAIR, precision="fp8"),
        ValueError,
        ["precision", "fp8", "ieee", "tf32"],
    ),
    "FSP weights": (lambda: FSP(PAIR, PAIR, weights=[1, 2]), ValueError, ["weights", "2", "1"]),
    "matrix batches": (lambda: fastkd.fsp_matrix(f(2, 3, 4), f(1, 3, 4)), ValueError, ["a", "b", "batch"]),
    "matrix ranks": (
        lambda: fastkd.fsp_matrix(f(2, 3, 4), f(2, 3, 4, 4)),
        ValueError,
        ["a", "b", "dimensions"],
    ),
    "matrix devices": (
        lambda: fastkd.fsp_matrix(f(2, 3, 4), f(2, 3, 4, device="meta")),
        ValueError,
        ["a", "b", "meta", "device"],
    ),
    "matrix channels": (lambda: fastkd.fsp_matrix(f(2, 3, 4), f(2, 0, 4)), ValueError, ["b", "channels"]),
    "matrix integers": (lambda: fastkd.fsp_matrix(f(2, 3, 4), f(2, 3, 4).long()), TypeError, ["b", "int64"]),
    "matrix pool_mode": (
        lambda: fastkd.fsp_matrix(f(2, 3, 4), f(2, 3, 4), pool_mode="min"),
        ValueError,
        ["pool_mode", "min", "avg", "max"],
    ),
    "matrix precision": (
        lambda: fastkd.fsp_matrix(f(2, 3, 4), f(2, 3, 4), precision="fp8"),
        ValueError,
        ["precision", "fp8", "ieee"],
    ),
    "KD classes": (
        lambda: fastkd.kd_loss(f(2, 3), f(2, 4)),
        ValueError,
        ["student_logits", "teacher_logits", "class"],
    ),
    "KD batches": (
        lambda: fastkd.kd_loss(f(2, 3), f(3, 3)),
        ValueError,
        ["student_logits", "teacher_logits", "batch"],
    ),
    "KD integers": (lambda: fastkd.kd_loss(f(2, 3).long(), f(2, 3)), TypeError, ["student_logits", "int64"]),
    "KD temperature": (lambda: fastkd.kd_loss(f(2, 3), f(2, 3), 0.0), ValueError, ["temperature", "0.0"]),
    "KD reduction": (
        lambda: fastkd.kd_loss(f(2, 3), f(2, 3), reduction="batch"),
        ValueError,
        ["reduction", "batch", "batchmean", "none"],
    ),
    "KD of one class": (
        lambda: fastkd.kd_loss(f(8, 1), f(8, 1)),
        ValueError,
        ["student_logits", r"\(8, 1\)", r"two", "z and 0"],
    ),
    "KD empty batch": (lambda: fastkd.kd_loss(f(0, 3), f(0, 3)), ValueError, ["student_logits", "sample"]),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("misuse", MISUSE)
def test_misuse_is_told_in_one_sentence(misuse, backend):
    call, kind, words = MISUSE[misuse]
    with fastkd.use_backend(backend), pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is kind and "\n" not in message and len(message) < 300, message
    for word in words:
        assert re.search(rf"(?<!\w){word}" if word.isalnum() and len(word) == 1 else word, message), (
            f"{word!r} is not in: {message}"
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_misuse_is_told_when_gradients_are_wanted_too(backend):
    x = f(2, 3, 4, 4).requires_grad_()
    for call, told in (
        (lambda: AT(x, f(3, 3, 4, 4)), "batch sizes differ"),
        (lambda: FSP([x, x], [x, f(2, 4, 4, 4)]), "channels differ"),
        (lambda: X(x, 0.5), "p is 0.5"),
        (lambda: fastkd.fsp_matrix(x, f(2, 3, 4)), "2 and 1 spatial dimensions"),
    ):
        with fastkd.use_backend(backend), pytest.raises(ValueError, match=told):
            call()
