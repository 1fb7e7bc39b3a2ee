"""What a run checks and says before it trains: on the device that it will train on, of the implementations
that will be called.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from pathlib import Path

import pytest
import torch
from torch import nn

from fastkd import backends, kernels, native
from fastkd import data as datasets
from fastkd.training import UserError
from fastkd.training.command import command
from fastkd.training.config import Config, Settings
from fastkd.training.run_summary import describe

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def loaded_once():
    """The digits, which every plan loads."""
    pytest.importorskip("sklearn")
    data, before = datasets.digits.load(), datasets._LOADERS["digits"]
    datasets._LOADERS["digits"] = lambda root: data
    yield
    datasets._LOADERS["digits"] = before


class OnCuda(torch.Tensor):
    """A tensor that says that it lies on a GPU, which need not be there; so do those that are computed from
    it.
    """

    device, is_cpu, is_cuda = torch.device("cuda", 0), False, True


@pytest.fixture
def stand_in(monkeypatch):
    """A device "cuda" without a GPU. Returns (backend, device) of the operators that are called on it; they
    compute nothing.
    """
    move, calls = nn.Module.to, []

    def to(self, *args, **options):
        if not (args and isinstance(args[0], torch.device) and args[0].type == "cuda"):
            return move(self, *args, **options)
        for module in self.modules():
            for name, value in module.named_parameters(recurse=False):
                module._parameters[name] = nn.Parameter(value.detach().as_subclass(OnCuda))
            for name, value in module.named_buffers(recurse=False):
                module._buffers[name] = value.as_subclass(OnCuda)
        return self

    def served(backend, operator, students, *args):
        calls.append((backend, students[0].device.type))
        return [torch.zeros(())]

    monkeypatch.setattr(nn.Module, "to", to)
    monkeypatch.setattr("fastkd.training.config.find_device", torch.device)
    monkeypatch.setattr("fastkd.training.run_summary.device_name", str)
    monkeypatch.setattr(native, "CUDA", dataclasses.replace(native.CUDA, available=True))
    monkeypatch.setattr(native, "EMULATED", None)
    monkeypatch.setattr(backends, "_capability", lambda index: (9, 0))
    monkeypatch.setattr(native, "cuda_architectures", lambda: ("sm_90",))
    monkeypatch.setattr(kernels, "state", lambda: (True, "a stand-in"))
    monkeypatch.setattr(kernels, "interpreting", lambda: False)
    for backend in (backends.CUDA, backends.TRITON):
        monkeypatch.setattr(backend, "run", functools.partial(served, backend.name))
    return calls


def losses_line(tmp_path, method, device, backend=None, model="resnet8", compile=False, **fields):
    with backends.use_backend(backend) if backend else contextlib.nullcontext():
        pair = {"teacher": model, "student": model, "device": device, "compile": compile}
        plan = Config(Settings(method, "digits", **pair, output=tmp_path, overrides=fields))
        return next(line for line in describe(plan).splitlines() if line.startswith("losses"))


@pytest.mark.parametrize("method", ["at", "fsp"])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_the_fit_is_tried_on_the_device_of_the_run(stand_in, tmp_path, backend, method):
    line = losses_line(tmp_path, method, "cuda", backend)
    assert stand_in and set(stand_in) == {(backend, "cuda")} and f"{method} by {backend}" in line
    with pytest.raises(
        UserError, match="'cpp' was asked for but serves CPU tensors only here, the first is on cuda"
    ) as caught:
        losses_line(tmp_path, method, "cuda", "cpp")
    assert "\n" not in str(caught.value)


def test_a_backend_of_a_gpu_is_refused_on_a_cpu(stand_in, tmp_path):
    for backend in ("cuda", "triton"):
        with pytest.raises(
            UserError,
            match=f"'{backend}' was asked for but serves CUDA tensors only here, the first is on cpu",
        ):
            losses_line(tmp_path, "at", "cpu", backend)


@pytest.mark.parametrize(
    ("method", "model", "batch", "words"),
    [
        ("at", "resnet8", 64, "ce by plain PyTorch, at by cuda"),
        ("at+kd", "resnet8", 64, "ce by plain PyTorch, at by cuda, kd by plain PyTorch"),
        ("fsp", "resnet8x4", 64, "ce by plain PyTorch, fsp by triton"),
        ("fsp", "resnet8x4", 800, "ce by plain PyTorch, fsp by triton"),
    ],
)
def test_the_implementation_named_is_that_of_the_runs_batches(
    stand_in, tmp_path, method, model, batch, words
):
    assert losses_line(tmp_path, method, "cuda", "auto", model, batch_size=batch).endswith(
        f"losses   {words}"
    )


@pytest.mark.parametrize(
    ("backend", "fields", "words"),
    [
        ("auto", {"batch_size": 64}, "at by reference in the compiled step"),
        (
            "auto",
            {"batch_size": 64, "drop_last": False},
            "at by reference in the compiled step (cpp in an epoch's last, smaller batch)",
        ),
        # three of them
        ("auto", {"batch_size": 479, "drop_last": False}, "at by reference in the compiled step"),
        ("cpp", {"batch_size": 64, "drop_last": False}, "at by cpp in the compiled step"),
        ("reference", {"batch_size": 64, "drop_last": False}, "at by reference in the compiled step"),
    ],
)
def test_a_compiled_run_names_what_its_graph_holds(cpp, tmp_path, backend, fields, words):
    assert losses_line(tmp_path, "at", "cpu", backend, compile=True, **fields).endswith(
        f"ce by plain PyTorch, {words}"
    )
    eager = losses_line(tmp_path, "at", "cpu", backend, **fields)
    assert eager.endswith("at by " + ("reference" if backend == "reference" else "cpp"))


@pytest.mark.parametrize("method", ["rkd", "crd", "ofd", "reviewkd", "norm"])
def test_the_losses_of_other_methods_are_named_too(cpp, tmp_path, method):
    """CRD and RKD are one operator in a graph, which chooses when it runs; the others are left to the
    compiler.
    """
    assert f"{method} by cpp" in losses_line(tmp_path, method, "cpu", "auto")
    plain, by = ("reference", "cpp") if method in ("rkd", "crd") else ("plain PyTorch", "reference")
    assert f"{method} by {plain}" in losses_line(tmp_path, method, "cpu", "reference")
    compiled = losses_line(tmp_path, method, "cpu", "auto", compile=True)
    assert f"{method} by {by} in the compiled step" in compiled


@pytest.mark.parametrize(
    ("features", "fast"),
    [
        ("flags\t\t: fpu avx2 avx512f amx_bf16 amx_tile", True),
        ("flags\t\t: fpu avx512f avx512_bf16", True),
        ("flags\t\t: fpu avx2 avx512f avx512_fp16", False),
        ("Features\t: fp asimd bf16", None),  # aarch64, which nobody has measured
        (None, None),
    ],
)
def test_auto_is_bf16_where_the_processor_has_instructions_for_it(monkeypatch, tmp_path, features, fast):
    read = Path.read_text

    def cpuinfo(self, *args, **options):
        if str(self) != "/proc/cpuinfo":
            return read(self, *args, **options)
        if features is None:
            raise FileNotFoundError(self)
        return f"processor\t: 0\n{features}\nbugs\t\t: spectre_v1\n\nprocessor\t: 1\n"

    monkeypatch.setattr(Path, "read_text", cpuinfo)

    def plan_of(precision):
        return Config(
            Settings(
                "baseline", "digits", student="resnet8", output=tmp_path, device="cpu", precision=precision
            )
        )

    chosen, auto = "bf16" if fast else "fp32", plan_of("auto")
    assert (
        auto.settings.precision
        == auto.config()["precision"]
        == auto.identity("student")["precision"]
        == chosen
    )
    assert f"--precision {chosen} " in command(auto) and f"1 thread, {chosen}, seed" in describe(auto)
    assert [line for line in describe(auto).splitlines() if "note" in line] == [
        f"note     --precision auto takes {chosen} on this device"
    ]
    assert plan_of("fp32").settings.precision == "fp32" == Settings("baseline").precision
    assert next(auto.batches("student")[0].train(1))[0].dtype == (torch.bfloat16 if fast else torch.float32)
    slow = (
        "note     bf16 is emulated on this processor, which has neither AMX nor AVX512-BF16, and 2 to 2.7"
        " times slower than fp32"
    )
    assert (slow in describe(plan_of("bf16"))) == (fast is False) and "note" not in describe(plan_of("fp32"))
    with pytest.raises(UserError, match="precision 'fp16' is not known; known: auto, fp32, bf16"):
        plan_of("fp16")


def test_a_gpu_is_asked_for_bf16(stand_in, monkeypatch, tmp_path):
    for fast, chosen in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation, fast=fast: fast and not including_emulation,
        )
        plan = Config(
            Settings(
                "baseline", "digits", student="resnet8", output=tmp_path, device="cuda", precision="auto"
            )
        )
        assert plan.settings.precision == chosen


def test_only_the_first_process_looks_into_the_output_folder(monkeypatch, tmp_path):
    settings = Settings(
        "baseline", "digits", student="resnet8", output=tmp_path / "file" / "runs", device="cpu"
    )
    (tmp_path / "file").touch()
    monkeypatch.setattr("fastkd.training.distributed.share", lambda: (1, 2))
    Config(settings)
    (tmp_path / "results.csv").write_text("time,price\n")
    Config(dataclasses.replace(settings, output=tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "results.csv"]
    monkeypatch.setattr("fastkd.training.distributed.share", lambda: (0, 2))
    with pytest.raises(UserError, match="results.csv cannot be read: Not a directory"):
        Config(settings)
