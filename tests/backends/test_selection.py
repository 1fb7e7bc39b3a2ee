"""How CRD and RKD choose a backend: once a call, within what Triton's kernels count, and never unseen; what
of a call is recorded for the first screen.
"""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
from crd_cases import case
from torch import func
from torch.autograd import forward_ad

import fastkd
from fastkd import backends, kernels, native
from fastkd.ops._cuda_limits import no_kernel
from fastkd.ops.norm import norm_loss

pytestmark = pytest.mark.usefixtures("one_thread")


class OnCuda(torch.Tensor):
    """A tensor that says that it lies on a CUDA device, which may not be there."""

    device, is_cpu, is_cuda = torch.device("cuda", 0), False, True


def on_cuda(*shape, dtype=torch.float32):
    return torch.empty((), dtype=dtype).expand(shape).as_subclass(OnCuda)


@pytest.fixture
def gpu(monkeypatch):
    """As on a GPU that both of its backends have code for."""
    monkeypatch.setattr(backends, "_capability", lambda index: (9, 0))
    monkeypatch.setattr(native, "CUDA", dataclasses.replace(native.CUDA, available=True))
    monkeypatch.setattr(native, "EMULATED", None)
    monkeypatch.setattr(native, "cuda_architectures", lambda: ("sm_90",))
    monkeypatch.setattr(kernels, "state", lambda: (True, "a stand-in"))
    monkeypatch.setattr(kernels, "interpreting", lambda: False)


def crd_call(dtype=torch.float32):
    student, *rest = case(3, 5, size=9, width=4, dtype=dtype)
    return lambda x=None: fastkd.crd_loss(student if x is None else x, *rest)[0], student


def rkd_call(dtype=torch.float32):
    student, teacher = torch.randn(4, 3, dtype=dtype), torch.randn(4, 5, dtype=dtype)
    return lambda x=None: fastkd.rkd_loss(student if x is None else x, teacher), student


CALLS = {"crd_loss": crd_call, "rkd_loss": rkd_call}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["auto", "reference", "cpp"])
@pytest.mark.parametrize("loss", CALLS)
def test_a_call_chooses_once(cpp, monkeypatch, loss, name, dtype):
    call, student = CALLS[loss](dtype)
    chosen, select = [], backends.select
    monkeypatch.setattr(backends, "select", lambda *args: chosen.append(args[0]) or select(*args))
    with fastkd.use_backend(name), backends.record_calls() as calls:
        call(student.requires_grad_()).backward()
        assert chosen == [loss.replace("loss", "pass")] and len(calls) == 1
        assert calls[0].backend(7, False) == ("cpp" if name == "auto" else name)


@pytest.mark.parametrize("loss", CALLS)
def test_in_a_graph_the_operator_chooses_when_it_runs(cpp, loss):
    """So the first screen says of a compiled step what it says of another."""
    call, student = CALLS[loss]()
    with backends.record_calls() as calls:
        call()
    assert [calls[0].backend(7, compiled) for compiled in (False, True)] == ["cpp", "cpp"]
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    with fastkd.use_backend("auto"):
        compiled(student)
        with torch.profiler.profile() as found:
            compiled(student)
    kernel = {"crd_loss": "fastkd::crd_pass", "rkd_loss": "fastkd::rkd_angles"}[loss]
    assert kernel in {event.key for event in found.key_averages()}
    with backends.record_calls() as calls:
        fastkd.attention_map(torch.ones(2, 3, 4))
    assert [calls[0].backend(7, compiled) for compiled in (False, True)] == ["cpp", "reference"]


@pytest.mark.parametrize(
    "loss",
    [fastkd.hcl_loss, lambda s, t: fastkd.ofd_loss(s, t, torch.zeros(3)), lambda s, t: norm_loss(s, t, 1)],
    ids=["hcl", "ofd", "norm"],
)
def test_a_kernel_call_is_one_that_a_kernel_serves(cpp, loss):
    """Maps of two memory layouts go through plain PyTorch, and the first screen must not say otherwise."""
    student, teacher = torch.randn(2, 2, 3, 4, 4)
    for other, wanted in ((teacher, ["cpp"]), (teacher.contiguous(memory_format=torch.channels_last), [])):
        with backends.record_calls() as calls:
            loss(student, other)
        assert [call.backend(7, False) for call in calls] == wanted


def test_what_is_recorded_keeps_no_tensor_and_no_graph_alive():
    leaf = torch.randn(6, 4).requires_grad_()
    student, bank = leaf * 2, torch.randn(1000, 4)
    empty, number = torch.randn(0, 4), torch.tensor(1.0)
    given = ([student, bank], empty, number, (1.0, None))
    with backends.record_calls() as calls, fastkd.use_backend("auto"):
        backends.select("attention_map", given, no_kernel)
    (call,) = calls
    pair, *rest = call.arguments
    assert not any(x.requires_grad or x.grad_fn for x in pair) and rest[-1] == (1.0, None)
    assert [x.untyped_storage().nbytes() for x in (*pair, *rest[:2])] == 4 * [4]
    seen = []
    asked = call._replace(cuda_limits=lambda arguments, options: seen.append(arguments) or "")
    with fastkd.use_backend("cuda"), contextlib.suppress(fastkd.BackendError):  # where there is no GPU
        asked.backend(7, False)
    shapes = [tuple(x.shape) for x in (*seen[0][0], *seen[0][1:3])]
    assert shapes == [(7, 4), (7, 4), (7, 4), ()]


@pytest.mark.parametrize(
    ("operation", "arguments", "options", "words"),
    [
        ("crd_pass", 4 * [(8, 2**14)], (2**30,), ""),
        ("crd_pass", 4 * [(8, 2**14 + 1)], (5,), "embeddings of up to 16384 numbers, not 16385"),
        ("crd_pass", 4 * [(8, 4)], (2**30 + 1,), "up to 1073741824 rows an image, not 1073741825"),
        ("rkd_pass", [(46336, 3), (46336, 2, 2)], (), ""),
        ("rkd_pass", 2 * [(46337, 3)], (), "up to 46336 samples, not 46337"),
        ("rkd_pass", [(2, 3), (2, 2**15, 2**16)], (), "up to 1073741824 numbers a sample, not 2147483648"),
        ("attention_map", [(1, 2, 2**29 + 1)], (), ""),
        ("attention_map", [(1, 1, 2**15, 2**16)], (), "up to 1073741824 positions and channels, not"),
        ("fsp_matrix", 2 * [(1, 2**30 + 1, 1)], (), "up to 1073741824 positions and channels, not"),
    ],
)
def test_auto_passes_by_what_tritons_kernels_cannot_count(gpu, operation, arguments, options, words):
    tensors = tuple(on_cuda(*shape) for shape in arguments)
    with fastkd.use_backend("auto"):
        found = backends.select(operation, tensors, no_kernel, options)
    assert found.name == ("reference" if words else "triton")
    with fastkd.use_backend("triton"):
        if not words:
            assert backends.select(operation, tensors, no_kernel, options).name == "triton"
            return
        with pytest.raises(fastkd.BackendError, match=f"'triton' .*its kernels take .*{words}") as caught:
            backends.select(operation, tensors, no_kernel, options)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("loss", CALLS)
def test_both_are_asked_with_what_their_kernels_count(monkeypatch, loss):
    """How many rows are drawn, and the dtype of CRD's normalizers too."""
    monkeypatch.setattr(kernels, "interpreting", lambda: True)
    monkeypatch.setattr(kernels, "state", lambda: (True, "a stand-in"))
    name, most = {"crd_loss": ("LARGEST", 5), "rkd_loss": ("MOST_SAMPLES", 3)}[loss]
    monkeypatch.setattr(f"fastkd.kernels.limits.{name}", most)
    with fastkd.use_backend("triton"), pytest.raises(fastkd.BackendError, match=f"take up to {most} "):
        CALLS[loss]()[0]()


def test_normalizers_in_float64_are_not_for_triton(monkeypatch):
    monkeypatch.setattr(kernels, "interpreting", lambda: True)
    monkeypatch.setattr(kernels, "state", lambda: (True, "a stand-in"))
    tensors = case(3, 5, size=9, width=4, dtype=torch.float32)
    with fastkd.use_backend("triton"), pytest.raises(fastkd.BackendError, match="not float64"):
        fastkd.crd_loss(*tensors, normalizers=torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("way", ["grad", "vmap", "forward mode AD"])
@pytest.mark.parametrize("loss", CALLS)
def test_a_backend_asked_for_by_name_has_no_rules_for_transforms_and_says_so(cpp, loss, way):
    call, student = CALLS[loss]()

    def run():
        if way == "grad":
            return func.grad(call)(student)
        if way == "vmap":
            return func.vmap(call)(student[None])
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(call(forward_ad.make_dual(student, student))).tangent

    wanted = {"auto": run(), "reference": None}
    for name in wanted:
        with fastkd.use_backend(name):
            torch.testing.assert_close(run(), wanted["auto"])
    with (
        fastkd.use_backend("cpp"),
        pytest.raises(
            fastkd.BackendError,
            match=rf"'cpp' .*no rules for torch.func and .*; use fastkd\.reference\.{loss}$",
        ),
    ):
        run()


@pytest.mark.parametrize("loss", CALLS)
def test_without_a_tangent_forward_mode_stops_no_kernel(cpp, loss):
    call, student = CALLS[loss]()
    with fastkd.use_backend("cpp"):
        wanted = call()
        with forward_ad.dual_level():
            assert torch.equal(call(student), wanted)


@pytest.mark.parametrize("loss", CALLS)
def test_cuda_has_no_kernel_of_either(gpu, loss):
    tensors = on_cuda(2, 3), on_cuda(2, 3)
    why = "'cuda' was asked for but cannot serve the call: it has no kernel of this operation$"
    with fastkd.use_backend("cuda"), pytest.raises(fastkd.BackendError, match=why):
        backends.select(loss.replace("loss", "pass"), tensors, no_kernel)
