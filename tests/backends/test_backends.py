"""Choosing a backend, and what every choice must keep: no fallback, the same bits in each run and thread
count, NaN where eager has NaN.
"""

from __future__ import annotations

import dataclasses
import itertools
import warnings

import kernel_backends
import pytest
import torch
from child_process import python
from recorder import Recorder, fused_only

import fastkd
from fastkd import backends, errors, kernels, native

pytestmark = pytest.mark.usefixtures("one_thread")


def test_use_backend_nests_and_restores_after_an_error():
    outside = backends.current()
    with fastkd.use_backend("reference"):
        with pytest.raises(KeyError), fastkd.use_backend("auto"):
            assert backends.current() == "auto"
            raise KeyError
        assert backends.current() == "reference"
    assert backends.current() == outside


def test_the_tests_of_a_backend_whose_first_kernel_fails_are_there_to_say_so(monkeypatch, capsys):
    def broken(*tensors):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(fastkd, "attention_map", broken)
    assert kernel_backends.missing.__wrapped__("cpp") == ""
    said = capsys.readouterr().err
    assert "the first kernel of backend 'cpp' fails: RuntimeError: Failed to find C compiler" in said


def test_an_unknown_backend_is_refused_with_the_known_names():
    with pytest.raises((fastkd.BackendError, ValueError)) as caught, fastkd.use_backend("metal"):
        pass
    assert all(word in str(caught.value) for word in ("metal", "auto", "reference", "cpp", "triton", "cuda"))


class OnCuda(torch.Tensor):
    """A tensor that says that it lies on a CUDA device, which may not be there."""

    device, is_cpu, is_cuda = torch.device("cuda", 0), False, True


def chosen(
    monkeypatch,
    *arguments,
    operation="attention_map",
    triton=True,
    cuda=True,
    why_not_cuda="",
    capability=(9, 0),
):
    """What ``auto`` chooses for tensors on a CUDA device, and the warnings."""
    monkeypatch.setattr(kernels, "state", lambda: (triton, "the remedy"))
    monkeypatch.setattr(native, "CUDA", dataclasses.replace(native.CUDA, available=cuda))
    monkeypatch.setattr(errors, "_said", set())
    monkeypatch.setattr(backends, "_capability", lambda index: capability)
    monkeypatch.setattr(native, "cuda_architectures", lambda: ("sm_80", "sm_90", "sm_100", "compute_100"))
    with warnings.catch_warnings(record=True) as caught, fastkd.use_backend("auto"):
        warnings.simplefilter("always")
        answers = [backends.select(operation, arguments, lambda *given: why_not_cuda).name for _ in range(2)]
    assert answers[0] == answers[1]
    return answers[0], [str(w.message) for w in caught]


def on_cuda(*shape, dtype=torch.float16):
    return torch.empty(1, dtype=dtype).expand(shape).as_subclass(OnCuda)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize(
    "with_triton, with_cuda, why_not", list(itertools.product((False, True), (False, True), ("", "p is 3")))
)
def test_auto_takes_what_serves_a_cuda_tensor_and_warns_once_where_only_triton_is_missing(
    monkeypatch, with_triton, with_cuda, why_not, dtype
):
    x = on_cuda(2, 3, 4, dtype=dtype)
    backend, messages = chosen(
        monkeypatch,
        [x, x],
        [x, x],
        operation="fsp_loss",
        triton=with_triton,
        cuda=with_cuda,
        why_not_cuda=why_not,
    )
    served = with_triton and dtype != torch.float64
    assert backend == ("cuda" if with_cuda and not why_not else "triton" if served else "reference")
    assert len(messages) == (backend == "reference" and not with_triton)
    assert all("the remedy" in message for message in messages)


@pytest.mark.parametrize("capability", [(6, 1), (7, 0), (7, 5)])
def test_auto_takes_the_reference_on_a_device_that_no_kernel_is_for_and_says_so_once(monkeypatch, capability):
    x = on_cuda(2, 3, 4)
    backend, messages = chosen(monkeypatch, [x, x], [x, x], operation="fsp_loss", capability=capability)
    assert backend == "reference" and len(messages) == 1
    assert "sm_{}{}".format(*capability) in messages[0] and "sm_80" in messages[0] and "\n" not in messages[0]


@pytest.mark.parametrize(
    "architectures, capability, served",
    [
        (["sm_80", "sm_90"], (8, 0), True),
        (["sm_80", "sm_90"], (8, 6), True),  # machine code serves later devices of its generation
        (["sm_86"], (8, 0), False),
        (["sm_80", "sm_90"], (12, 0), False),
        (["sm_80", "compute_90"], (12, 0), True),  # PTX serves every later device
        (["compute_90"], (8, 9), False),
        (["sm_90a", "compute_90a"], (9, 0), True),
        (["sm_90a", "compute_90a"], (10, 0), False),  # what is special to a device serves no other
        (["sm_100f"], (10, 3), True),
        (["sm_75"], (7, 5), True),
        ([], (9, 0), False),
    ],
)
def test_the_cuda_library_serves_the_devices_that_it_has_code_for(
    monkeypatch, architectures, capability, served
):
    assert native.has_code(architectures, capability) == served
    monkeypatch.setattr(backends, "_capability", lambda index: capability)
    monkeypatch.setattr(native, "CUDA", dataclasses.replace(native.CUDA, available=True))
    monkeypatch.setattr(native, "EMULATED", None)
    monkeypatch.setattr(native, "cuda_architectures", lambda: tuple(architectures))
    x = on_cuda(2, 3, 4)
    with fastkd.use_backend("cuda"):
        if served:
            assert backends.select("attention_map", (x,), lambda *given: "").name == "cuda"
        else:
            with pytest.raises(fastkd.BackendError, match="sm_{}{}".format(*capability)):
                backends.select("attention_map", (x,), lambda *given: "")


def test_auto_leaves_large_products_and_pooling_to_triton_where_it_is(monkeypatch):
    large, small = [[on_cuda(64, c // d, 28, 28) for c in (256, 512, 1024)] for d in (1, 16)]
    pooled = [on_cuda(4, 16, n, n) for n in (32, 32, 16)]
    for chain, teacher, operation, triton, backend in (
        (large, large, "fsp_loss", True, "triton"),
        (large, large, "fsp_loss", False, "cuda"),
        (large, large, "attention_transfer_loss", True, "cuda"),
        (small, small, "fsp_loss", True, "cuda"),
        (pooled, small, "fsp_loss", True, "triton"),
        (small, pooled, "fsp_loss", True, "triton"),
        (pooled, pooled, "fsp_loss", False, "cuda"),
    ):
        assert chosen(monkeypatch, chain, teacher, operation=operation, triton=triton)[0] == backend
    for first, second, backend in ((*large[:2], "triton"), (*small[:2], "cuda"), (*pooled[1:], "triton")):
        assert chosen(monkeypatch, first, second, operation="fsp_matrix")[0] == backend


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4)], ids=str)
def test_auto_chooses_for_empty_features_too(monkeypatch, shape):
    """The kernels refuse them, and the checks say why."""
    x = on_cuda(*shape)
    assert chosen(monkeypatch, [x, x], [x, x], operation="fsp_loss")[0] == "cuda"
    assert chosen(monkeypatch, x, x, operation="fsp_matrix")[0] == "cuda"


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_backend_that_cannot_serve_a_cpu_tensor_says_so(backend, monkeypatch):
    monkeypatch.setattr(kernels, "interpreting", lambda: False)
    monkeypatch.setattr(native, "EMULATED", None)
    x = [torch.ones(2, 3, 4, 4)] * 2
    calls = (
        lambda: fastkd.attention_map(x[0]),
        lambda: fastkd.attention_transfer_loss(x, x),
        lambda: fastkd.fsp_matrix(*x),
        lambda: fastkd.fsp_loss(x, x),
    )
    for call in calls:
        with fastkd.use_backend(backend), pytest.raises(fastkd.BackendError, match=backend):
            call()
    assert issubclass(fastkd.BackendError, RuntimeError)


def test_environment_sets_the_default_backend():
    code = "import torch, fastkd; fastkd.attention_map(torch.ones(1, 1, 1))"
    refused = python(code, FASTKD_BACKEND="triton")
    assert refused.returncode != 0 and "BackendError" in refused.stderr and "triton" in refused.stderr
    unknown = python(code, FASTKD_BACKEND="metal")
    assert unknown.returncode != 0 and "metal" in unknown.stderr and "reference" in unknown.stderr


def test_reference_backend_calls_no_operator_of_ours():
    x, y = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    with fastkd.use_backend("reference"), Recorder() as calls:
        (
            fastkd.attention_map(x),
            fastkd.attention_transfer_loss(x, y),
            fastkd.fsp_matrix(x, y),
            fastkd.fsp_loss([x, x], [y, y]),
        )
    assert not calls.fused


def test_auto_takes_the_kernels_where_they_are(cpp):
    x = torch.randn(2, 3, 4, 4)
    with fastkd.use_backend("auto"), fused_only():
        fastkd.attention_map(x)


def test_operators_on_the_cpu_are_the_compiled_ones(cpp):
    """A Python implementation registered over the compiled one would pass every other test."""
    for function in ("attention_map", "attention_transfer_loss", "fsp_matrix", "fsp_loss"):
        for operator in (function, f"{function}_backward"):
            kernels = [
                line
                for line in torch._C._dispatch_dump(f"fastkd::{operator}").splitlines()
                if line.startswith(("CPU:", "Composite"))
            ]
            assert len(kernels) == 1 and kernels[0].startswith("CPU:") and ".py" not in kernels[0], kernels
