"""What benchmarks/gpu.py runs in processes of its own.

    python -m speed.gpu_parts facts|smoke BACKEND|small-set|launches|rates|compile-tiles|tiles

Each prints its findings line by line, so that a part that is stopped has said what it found, and writes JSON
into FASTKD_GPU_OUT. FASTKD_GPU_REHEARSAL=1 goes through the same on a CPU, with Triton interpreted and the
CUDA kernels emulated.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

import fastkd
from fastkd import backends, reference
from speed import gpu_methods, machine
from speed.cases import Case, features
from speed.gpu import CHAINS, LARGE
from speed.gpu_device import DEVICE, REHEARSAL, Features, save, seconds_of, wait
from speed.gpu_tiles import compile_tiles, tiles

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
# of the largest value of the exact result: rounding to the dtype, and float32 sums of a few thousand terms
ALLOWED = {"float32": 1e-4, "bfloat16": 2.0**-7, "float16": 2.0**-10}
Counted = gpu_methods.Counted
SIZES = ((16, 14), (24, 7), (32, 5))  # channels, height and width of small stages


def serving() -> list[str]:
    return [name for name in ("cuda", "triton") if backends.availability()[name][0]]


def facts() -> None:
    """Versions, the device and its clocks."""
    found = machine.facts(sys.argv)
    found["backends"] = {name: list(state) for name, state in backends.availability().items()}
    found["triton"] = machine.version("triton")
    if not REHEARSAL:
        properties = torch.cuda.get_device_properties(0)
        found["gpu_properties"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "count": torch.cuda.device_count(),
        }
    save("facts", found)
    if shutil.which("nvidia-smi"):
        with contextlib.suppress(subprocess.TimeoutExpired):
            done = subprocess.run(
                ["nvidia-smi", "-q", "-d", "CLOCK,PERFORMANCE,POWER"],
                capture_output=True,
                text=True,
                timeout=5,
            )
            found["nvidia_smi"] = done.stdout.splitlines()
            save("facts", found)
    print(
        f"{found.get('gpu', 'no GPU')}, torch {torch.__version__}, triton {found['triton']},"
        f" {found['backends']}"
    )


def operations(module: Any) -> dict[str, Callable[[Features, Features], torch.Tensor]]:
    """Scalars that reach every kernel of the package, as functions of student and teacher features."""

    def tapped(function: Callable[..., Any]) -> Callable[[Features, Features], torch.Tensor]:
        def scalar(s: Features, t: Features) -> torch.Tensor:
            pairs = [function(x) for x in s]
            maps = [m for _, m in pairs]
            passed = sum(
                y.float().square().mean() if y.dtype != torch.float64 else y.square().mean() for y, _ in pairs
            )
            return module.attention_transfer_loss(maps, t, student_is_map=True, weight=1000.0) + passed

        return scalar

    return {
        "attention_transfer_loss": lambda s, t: module.attention_transfer_loss(s, t, weight=1000.0),
        "attention_map": lambda s, t: sum(
            module.attention_map(x).square().flatten(1)[:, ::2].sum() for x in s
        ),
        "fsp_loss": lambda s, t: module.fsp_loss(s, t, weight=100.0, precision="ieee"),
        "fsp_loss column_l2": lambda s, t: module.fsp_loss(s, t, distance="column_l2", precision="ieee"),
        "fsp_loss max": lambda s, t: module.fsp_loss(s, t, pool_mode="max", weight=100.0, precision="ieee"),
        "fsp_matrix": lambda s, t: module.fsp_matrix(s[0], s[1], precision="ieee").square().sum(),
        "tap": tapped(module.tap),
        "relu_tap": tapped(module.relu_tap),
    }


def smoke_features(dtype: str, layout: str) -> tuple[Features, Features]:
    """Students' and teachers', on the CPU."""
    torch.manual_seed(0)
    students, teachers = (
        [torch.randn(4, c, n, n).to(DTYPES[dtype]).to(memory_format=LAYOUTS[layout]) for c, n in SIZES]
        for _ in range(2)
    )
    return students, teachers


def smoke(backend: str) -> int:
    """Each operation, dtype and layout against float64 on the CPU, a line each. Returns the failures."""
    wrong = count = 0
    table: dict[str, Any] = {}
    exact_forms, forms = operations(reference), operations(fastkd)
    if backend == "triton":
        exact_forms |= gpu_methods.operations(reference)
        forms |= gpu_methods.operations(fastkd)
    try:
        for dtype, layout in itertools.product(DTYPES, LAYOUTS):
            students, teachers = smoke_features(dtype, layout)
            for name, form in forms.items():
                wide = [x.double().requires_grad_() for x in students]
                value = exact_forms[name](wide, [x.double() for x in teachers])
                exact = torch.autograd.grad(value, wide, allow_unused=True)
                label = f"{backend} {name} {dtype} {layout}"
                try:
                    given = [x.to(DEVICE).requires_grad_() for x in students]
                    with fastkd.use_backend(backend):
                        ours = form(given, [x.to(DEVICE) for x in teachers])
                        grads = torch.autograd.grad(ours, given, allow_unused=True)
                    errors = [abs(ours.item() / value.item() - 1)]
                    errors += [
                        ((g.double().cpu() - e).abs().max() / e.abs().max()).item()
                        for g, e in zip(grads, exact)
                        if e is not None
                    ]
                    good = all(error <= ALLOWED[dtype] for error in errors)  # not so for NaN
                    told = (
                        f"{'ok' if good else 'WRONG'}: loss {errors[0]:.1e}, gradient {max(errors[1:]):.1e}"
                    )
                except Exception as error:  # the next may still work, and each is worth its line
                    good, told = (
                        False,
                        f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:200]}",
                    )
                count, wrong = count + 1, wrong + (not good)
                table[label] = told
                print(f"{label}: {told}", flush=True)
                save(f"smoke-{backend}", table)
    finally:  # at its limit too
        print(f"{count - wrong} of {count} are right")
    return wrong


def small_set() -> None:
    """What compute-sanitizer watches: each operation of the CUDA library, both ways, on small shapes."""
    calls = 0
    for dtype, layout in itertools.product(("float32", "bfloat16"), LAYOUTS):
        made = [
            torch.randn(3, c, n, n, device=DEVICE).to(DTYPES[dtype]).to(memory_format=LAYOUTS[layout])
            for c, n in SIZES * 2
        ]
        students, teachers = [x.requires_grad_() for x in made[:3]], made[3:]
        with fastkd.use_backend("cuda"):
            for form in operations(fastkd).values():
                form(students, teachers).backward()
                calls += 1
    wait()
    print(f"{calls} operations with their gradients")


def launches() -> None:
    """Kernels of one call each way, by name, as the device saw them: how many, and their microseconds."""
    kind = torch.profiler.ProfilerActivity.CPU if REHEARSAL else torch.profiler.ProfilerActivity.CUDA
    losses: dict[str, Callable[..., torch.Tensor]] = {
        "attention": fastkd.attention_transfer_loss,
        "fsp": fastkd.fsp_loss,
    }
    calls: list[tuple[str, str, Callable[[], Counted]]] = [
        (backend, f"{operation} {shape}", functools.partial(_of_features, loss, operation, shape))
        for backend in serving()
        for (operation, loss), shape in itertools.product(losses.items(), (CHAINS[0], LARGE))
    ]
    if "triton" in serving():
        calls += [("triton", name, made) for name, made in gpu_methods.counted(DEVICE, REHEARSAL).items()]
    found: dict[str, Any] = {}
    for backend, about, made in calls:
        name = f"{backend} {about}"
        try:
            found[name] = _launches(backend, *made(), kind)
            told = []
            for way, events in found[name].items():
                count = sum(count for count, _ in events.values())
                microseconds = sum(taken for _, taken in events.values())
                told.append(f"{way} {count} in {microseconds:.1f} us")
            print(f"{name}: {', '.join(told)}", flush=True)
        except Exception as error:
            print(f"{name}: FAILED: {type(error).__name__}: {' '.join(str(error).split())[:200]}", flush=True)
        save("launches", found)


def _of_features(loss: Callable[..., torch.Tensor], operation: str, shape: str) -> Counted:
    students, teachers = features(Case(operation, "small" if REHEARSAL else shape))
    s, t = [x.detach().to(DEVICE).requires_grad_() for x in students], [x.to(DEVICE) for x in teachers]
    return functools.partial(loss, s, t), s


def _launches(
    backend: str, loss: Callable[[], torch.Tensor], leaves: Features, kind: Any
) -> dict[str, dict[str, tuple[int, float]]]:
    """Of each way and kernel how often it was launched, and its microseconds, all launches together."""
    counts: dict[str, dict[str, tuple[int, float]]] = {}
    with fastkd.use_backend(backend):
        for _ in range(3):
            torch.autograd.grad(loss(), leaves)
        held: dict[str, torch.Tensor] = {}

        def forward() -> None:
            held["loss"] = loss()

        ways = (("forward", forward), ("backward", lambda: torch.autograd.grad(held["loss"], leaves)))
        for way, call in ways:
            wait()
            with torch.profiler.profile(activities=[kind], acc_events=True) as profile:
                call()
                wait()
            seen = [
                event
                for event in profile.key_averages()
                if str(event.device_type).endswith("CPU" if REHEARSAL else "CUDA")
            ]
            counts[way] = {event.key: (event.count, round(event.device_time_total, 2)) for event in seen}
    return counts


def rates() -> None:
    """Bandwidth of a plain copy, beyond the cache, and rates of square matrix products."""
    size, side = (2**12, 32) if REHEARSAL else (2**28, 8192)
    found: dict[str, float] = {}
    a, b = (torch.empty(size, device=DEVICE).uniform_() for _ in range(2))
    found["copy GB/s"] = 2 * a.nbytes / seconds_of(lambda: b.copy_(a)) / 1e9
    products = (
        ("float32 ieee", torch.float32, False),
        ("float32 tf32", torch.float32, True),
        ("bfloat16", torch.bfloat16, False),
    )
    for name, dtype, tf32 in products:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        x, y = (torch.randn(side, side, device=DEVICE).to(dtype) for _ in range(2))
        found[f"{name} TFLOP/s"] = 2 * side**3 / seconds_of(functools.partial(torch.mm, x, y)) / 1e12
        save("rates", found)
    print(", ".join(f"{name} {value:.1f}" for name, value in found.items()))


def main() -> int:
    if REHEARSAL:
        torch.set_num_threads(1)
        import emulated  # of the tests

        emulated.load()
        if "triton" in serving():
            # of the tests: bfloat16 would be cut off, not rounded
            importlib.import_module("interpreter").mend()
    name, *rest = sys.argv[1:]
    named: dict[str, Callable[..., Any]] = {
        "facts": facts,
        "smoke": smoke,
        "small-set": small_set,
        "launches": launches,
        "rates": rates,
        "compile-tiles": compile_tiles,
        "tiles": tiles,
    }
    try:
        return min(named[name](*rest) or 0, 1)
    except KeyboardInterrupt:
        return 130  # at its limit: its last line is what it found


if __name__ == "__main__":
    sys.exit(main())
