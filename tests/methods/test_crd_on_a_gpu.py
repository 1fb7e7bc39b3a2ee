"""CRD on a GPU that is not there: with fake tensors on it, reading a number or copying from the CPU is seen,
for which a host would wait, and what adds in any order.

The device is said to be older than Triton's kernels want, so what runs is CRD's plain PyTorch and whatever a
step does around the loss. Triton's launcher is never asked: that it does not wait is what
``test_no_call_waits_for_the_device`` in tests/backends/test_triton_crd_gpu.py asks of a GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastkd
from fastkd import backends
from fastkd.methods import BuildContext, create_method
from fastkd.models import create_model
from fastkd.ops import crd

ATOMIC = ("scatter_add", "index_add", "scatter_reduce", "index_reduce", "histc", "put_")
"""Of operators that add by atomics on a GPU; ``index_put_`` sorts there."""


class Seen(TorchDispatchMode):
    """Names of the operators that brought something from the CPU to a GPU or back, or added in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.name() in ("aten::_to_copy", "aten::copy_"):
            tensors = [x for x in tree_leaves((args, out)) if isinstance(x, torch.Tensor)]
            if len({x.device.type for x in tensors}) > 1:
                self.found.append(func.name())
        if func.name().removeprefix("aten::").startswith(ATOMIC):
            self.found.append(func.name())
        return out


@pytest.fixture
def gpu(monkeypatch):
    """Makes fake tensors on a GPU; at the end nothing has been copied, or added in any order."""
    monkeypatch.setattr(backends, "_capability", lambda index: (7, 0))
    monkeypatch.setattr(backends.errors, "warn_once", lambda text: None)
    with FakeTensorMode(), Seen() as seen:
        yield lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device="cuda")
    assert not seen.found


def moved(module, gpu):
    """The module with fake tensors in place of its buffers and weights."""
    for part in module.modules():
        for tensors in (part._buffers, part._parameters):
            for name, x in tensors.items():
                if x is not None:
                    there = gpu(*x.shape, dtype=x.dtype)
                    learned = tensors is part._parameters
                    tensors[name] = torch.nn.Parameter(there) if learned else there
    return module


def method(**options):
    labels = torch.arange(400) % 7
    context = BuildContext.of(create_model("resnet8", 7), create_model("resnet8x4", 7), train_labels=labels)
    return create_method("crd", context, options={"crd": options}, seed=0)


CHOICES = [{}, {"k": 5, "positive": "relax"}, {"k": 900}, {"negatives": "queue", "queue": 50}]


@pytest.fixture(params=CHOICES, ids=str)
def built(request):
    return method(**request.param)


def test_drawing_scoring_and_the_banks_new_rows(built, gpu):
    built = moved(built, gpu)
    index, units = gpu(6, dtype=torch.int64), [gpu(6, 128, dtype=torch.float32) for _ in range(2)]
    if built.function is not None:
        rows = built.draw(index)
        assert rows.shape[0] == 6 and rows.is_cuda
        found = built.function(*units, rows)[1]
    else:
        found = built.recent(*units)[1]
    assert found.is_cuda
    built.update(index, (*units, found.expand(6, 2)))


@pytest.mark.parametrize("normalizers", [None, (3.0, 0.0)], ids=str)
def test_the_loss_whatever_its_normalizers_are(gpu, normalizers):
    tensors = gpu(6, 9), gpu(6, 9), gpu(40, 9), gpu(40, 9), gpu(6, 11, dtype=torch.int64)
    assert fastkd.crd_loss(*tensors, normalizers=normalizers)[0].is_cuda


@pytest.mark.parametrize("chunks", [0, 10**6], ids=["gathered", "whole"])
def test_plain_pytorch_behind_the_operator(gpu, monkeypatch, chunks):
    monkeypatch.setattr(crd, "CHEAPER", chunks)
    tensors = gpu(6, 9), gpu(6, 9), gpu(40, 9), gpu(40, 9), gpu(6, 11, dtype=torch.int64), gpu(2)
    assert all(x.is_cuda for x in crd._loss(*tensors, 0.07, 1e-7, 1.0, True, True))


def test_what_waits_is_seen():
    with FakeTensorMode(), Seen() as seen:
        with pytest.raises(DataDependentOutputException):
            bool(torch.empty(1, device="cuda") > 0)
        torch.tensor([1.0], device="cuda")
    assert seen.found


def test_slopes_are_added_where_their_rows_are():
    slopes, rows = torch.randn(5, 40, dtype=torch.float64), torch.randint(7, (5, 40))
    wanted = torch.zeros(5, 7, dtype=torch.float64)
    for i in range(5):
        for slope, row in zip(slopes[i], rows[i], strict=True):
            wanted[i, row] += slope
    for on_cpu in (True, False):
        found = crd.added(slopes, rows, 7, on_cpu)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
