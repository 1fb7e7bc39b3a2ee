"""Triton's kernels of what benchmarks/gpu.py runs, compiled on a machine without a GPU.

    TRITON_CACHE_DIR=DIR python -m speed.gpu_ahead CAPABILITY [WORD...]

with ``benchmarks`` and ``tests/helpers`` on PYTHONPATH; CAPABILITY is 90 for an H200, a WORD takes the cases
whose names contain it. Triton finds a kernel by its source, its arguments' types, alignments and constants,
the options, the target and its own version: what is compiled here is found there, with the same Python,
PyTorch and Triton. So are the C launchers, where a C compiler and Python's headers are.

The cases run by a stand-in for Triton's driver, which launches nothing. Their tensors lie on the CPU. Those
of more than a few thousand numbers have shapes and strides alone: nothing is computed of them, and their
memory is never touched.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"
os.environ["FASTKD_GPU_REHEARSAL"] = "1"  # tensors on the CPU

import torch
import triton
import triton_compile  # of the tests
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from triton.backends.nvidia import driver as nvidia
from triton.runtime import build, cache

import fastkd
from fastkd import _implementations, backends
from speed import gpu, gpu_ahead_tests, gpu_methods, gpu_parts, gpu_step, gpu_tiles
from speed.cases import features
from speed.gpu_device import Features
from speed.measure import both_passes
from speed.methods import Draw
from speed.rows import FUSED

FEW = 2**14  # numbers of tensors that are computed with


class Hollow(TorchDispatchMode):
    """Under it PyTorch's operators give tensors of the right shapes and strides, with anything in them."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        if func.namespace != "aten" or func.is_view or (given and sum(x.numel() for x in given) <= FEW):
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            returned = [x for x in (kwargs.get("out"), *args) if isinstance(x, Tensor)]
            return returned[0] if func._schema.returns else None
        if "scalar" in func._schema.name:  # item()
            return func(*args, **kwargs)
        meta_args, meta_kwargs = tree_map_only(
            Tensor, functools.partial(_like, device="meta"), (args, kwargs)
        )
        if not given or meta_kwargs.get("device") is not None:
            meta_kwargs["device"] = "meta"
        if "generator" in meta_kwargs:
            meta_kwargs["generator"] = None  # of another device
        made = func(*meta_args, **meta_kwargs)
        # by cuDNN; without data PyTorch takes NCHW
        if "convolution" in func._schema.name and any(_channels_last(x) for x in given):
            made = tree_map_only(Tensor, _to_channels_last, made)
        return tree_map_only(Tensor, _like, made)


def _channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.stride(1) == 1 and not x.is_contiguous()


def _to_channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x


def _like(x: Tensor, device: str = "cpu") -> Tensor:
    made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
    seen = device == "cpu" and (x.numel() <= FEW or not x.is_floating_point())  # rows of a bank, a loss
    return made.zero_() if seen else made


class Driver(triton_compile.Driver):
    """Launches nothing, and compiles the launchers."""

    def __init__(self, capability: int) -> None:
        super().__init__(capability)
        self.folder = tempfile.TemporaryDirectory()
        self.launchers = 0

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        constants = {
            (src.fn.arg_names.index(at),) if isinstance(at, str) else at: value
            for at, value in src.constants.items()
        }
        if hasattr(nvidia, "make_launcher"):  # not of every Triton
            self.compile_c("__triton_launcher", nvidia.make_launcher(constants, dict(src.signature), None))
        return lambda *args: None

    def compile_c(self, name: str, source: str) -> None:
        """As triton.runtime.build.compile_module_from_src, but linked with a libcuda that does nothing, and
        not loaded.
        """
        key = hashlib.sha256((source + build.platform_key()).encode()).hexdigest()
        kept, file = cache.get_cache_manager(key), f"{name}{build.sysconfig.get_config_var('EXT_SUFFIX')}"
        if kept.get_file(file) is not None:
            return
        folder = Path(self.folder.name)
        names = sorted(set(re.findall(r"\bcu[A-Z]\w*", source)))
        (folder / "cuda.c").write_text("".join(f"void {one}(void) {{}}\n" for one in names))
        (folder / f"{name}.c").write_text(source)
        stub = ("-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o", str(folder / "libcuda.so.1"))
        try:
            subprocess.run(
                [os.environ.get("CC", "cc"), str(folder / "cuda.c"), *stub], check=True, capture_output=True
            )
            made = build._build(
                name,
                str(folder / f"{name}.c"),
                str(folder),
                [nvidia.libdevice_dir, str(folder)],
                nvidia.include_dirs,
                nvidia.libraries,
                [],
            )
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            print(f"{name}: {type(error).__name__}: {error}; left to the machine with the GPU", flush=True)
            self.compile_c = lambda name, source: None  # type: ignore[method-assign]
            return
        kept.put(Path(made).read_bytes(), file, binary=True)
        self.launchers += 1


def cases(words: Sequence[str]) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is launched, by name, in the order of the parts."""
    yield "first calls", _first_calls
    for (dtype, layout), (name, form) in itertools.product(
        itertools.product(gpu_parts.DTYPES, gpu_parts.LAYOUTS),
        (gpu_parts.operations(fastkd) | gpu_methods.operations(fastkd)).items(),
    ):
        yield f"smoke {name} {dtype} {layout}", functools.partial(_smoke, form, dtype, layout)
    with mock.patch("torch.cuda.is_available", lambda: True):
        of_features = [case for operation in FUSED for case in gpu.cases(operation, True)]
    for case in {(*case.inputs, case.matmul): case for case in of_features}.values():
        yield f"speed {case.id}", functools.partial(_of_features, case)
    for make, sizes in gpu_methods.PROBLEMS:
        yield f"speed {make.__name__} {sizes}", functools.partial(_of_method, make, sizes)
    for model, batch in ((gpu_step.RESNET20, 128), (gpu_step.RESNET50, 64)):
        yield f"step {model}", functools.partial(_step, model, batch)
    if not words or any("test" in word for word in words):
        yield from gpu_ahead_tests.cases()  # launches the first kernel as it imports them
    for how, tried in gpu_tiles._wanted():
        yield f"tiles {how} {gpu_tiles._numbers(tried)}", functools.partial(_tile, how, tried)


def _first_calls() -> None:
    """Those by which benchmarks and tests find out whether the kernels run."""
    fastkd.attention_map(torch.ones(1, 1, 1))
    for loss in FUSED.values():
        loss([torch.ones(1, 1, 2, 2)] * 2, [torch.ones(1, 1, 2, 2)] * 2)


def _smoke(form: Callable[[Features, Features], Tensor], dtype: str, layout: str) -> None:
    students, teachers = gpu_parts.smoke_features(dtype, layout)
    given = [x.requires_grad_() for x in students]
    torch.autograd.grad(form(given, teachers), given, allow_unused=True)


def _of_features(case: gpu.GPUCase) -> None:
    students, teachers = features(case)
    with gpu.products(case.matmul):
        both_passes(functools.partial(FUSED[case.operation], students, teachers), students)()


def _of_method(make: Callable[..., Any], sizes: dict[str, int]) -> None:
    problem = make(Draw(torch.float32), **sizes)
    both_passes(problem.fastkd, problem.leaves)()


def _step(model: str, batch: int) -> None:
    step = gpu_step.Step(model, "cpu", batch, True)
    for form in (gpu_step.LOSS, gpu_step.TAP):
        step.run(form)()


def _tile(how: str, tried: Any) -> None:
    from fastkd.kernels.fsp import view

    present, view.TILES[how] = view.TILES[how], tried
    gpu_tiles._clear_plans()
    try:
        gpu_tiles._fsp_seconds(how, *features(gpu.GPUCase("fsp", gpu.LARGE)))
    finally:
        view.TILES[how] = present
        gpu_tiles._clear_plans()


def compile_ahead(capability: int, words: Sequence[str]) -> tuple[int, int]:
    """Returns how many kernels were compiled, and how many were there."""
    driver, counts = Driver(capability), [0, 0]
    triton.runtime.driver.set_active(driver)

    def count(*, cache_hit: bool, **rest: Any) -> None:
        counts[cache_hit] += 1

    triton.knobs.compilation.listener = count
    if hasattr(nvidia, "make_launcher"):
        driver.compile_c("cuda_utils", (Path(nvidia.__file__).parent / "driver.c").read_text())
    # a CPU tensor is to be served as one of the device
    vars(_implementations)["dispatch_watched"] = lambda: False
    vars(backends)["_must_serve"] = lambda *args: None
    begun = time.monotonic()
    for name, run in cases(words):
        if words and not any(word in name for word in words):
            continue
        before, started, why = list(counts), time.monotonic(), ""
        with Hollow(), fastkd.use_backend("triton"):
            try:
                run()
            except Exception as error:  # a device refuses it as well, or compiles it itself
                why = f"; {type(error).__name__}: {' '.join(str(error).split())[:120]}"
        made, found = (now - then for now, then in zip(counts, before))
        print(f"{name}: {made} compiled, {found} found, {time.monotonic() - started:.1f} s{why}", flush=True)
    print(
        f"{counts[0]} kernels compiled, {counts[1]} found, {driver.launchers} launchers compiled,"
        f" {time.monotonic() - begun:.0f} s, into {triton.knobs.cache.dir}"
    )
    return counts[0], counts[1]


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        compile_ahead(int(sys.argv[1]), sys.argv[2:])
