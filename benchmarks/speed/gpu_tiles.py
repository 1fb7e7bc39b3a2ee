"""Other tiles for FSP by Triton, compiled side by side and timed on a GPU."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import fastkd
from speed.cases import Case, features
from speed.gpu import LARGE
from speed.gpu_device import DEVICE, REHEARSAL, Features, save, seconds_of

if TYPE_CHECKING:
    from fastkd.kernels.fsp.view import Tiles

HELPERS = Path(__file__).resolve().parents[2] / "tests" / "helpers"
PRECISIONS = ("tf32", "bf16")
SHAPES = ((128, 32), (64, 32), (128, 16))  # block and depth
STAGES = (3, 4, 1, 2)
PROCESSES = 12  # at most, that compile
Compiled = Future[dict[str, dict[str, int]]]


def tiles(seconds: str = "60") -> None:
    """FSP by Triton at the ResNet-50 stages, forward and backward, with other tiles: prints the lines for
    ``view.TILES``.

    Tries as many as there is time for, the present one first; passes over one that does not compile. Without
    a GPU it compiles them for sm_90, and times interpreted kernels of small shapes.
    """
    from fastkd.kernels.fsp import view

    end = time.monotonic() + float(seconds)
    found: dict[str, dict[str, float]] = {}
    wanted = _wanted()
    present = dict(wanted[: len(PRECISIONS)])
    students, teachers = features(Case("fsp", "small" if REHEARSAL else LARGE))
    try:
        with _compiling(wanted, end) as compiled:
            for (how, tried), kernels in zip(wanted, compiled):
                told = f"{how} ({_numbers(tried)})"
                view.TILES[how] = tried
                try:
                    used = kernels.result(max(end - time.monotonic(), 0))
                    milliseconds = _fsp_seconds(how, students, teachers) * 1e3
                except (TimeoutError, NotYet):  # one and the same from Python 3.11 on
                    print(f"{told} and what follows: no time", flush=True)
                    break
                except Exception as error:
                    why = " ".join(str(error).split())[:120]
                    print(f"{told}: {type(error).__name__}: {why}", flush=True)
                    continue
                found.setdefault(how, {})[_tile_line(how, tried)] = milliseconds
                print(f"{told}: {milliseconds:.3f} ms; {_registers(used)}", flush=True)
                save("tiles", found)
    finally:
        view.TILES.update(present)
        _clear_plans()
    for times in found.values():
        best = min(times, key=times.__getitem__)
        print(f"{best}  # {times[best]:.3f} ms; at present {next(iter(times.values())):.3f}")


def compile_tiles(seconds: str, processes: str) -> None:
    """Compiles them into Triton's cache, so many at a time."""
    with _compiling(_wanted(), time.monotonic() + float(seconds), int(processes)) as compiled:
        for (how, tried), kernels in zip(_wanted(), compiled):
            with contextlib.suppress(Exception):  # `tiles` says why
                kernels.result()
                print(f"{how} ({_numbers(tried)})", flush=True)


def _wanted() -> list[tuple[str, Tiles]]:
    """What is compared, by precision: what the table has first."""
    from fastkd.kernels.fsp import view

    present = {how: view.TILES[how] for how in PRECISIONS}
    others = [view.Tiles(block, depth, stages) for stages in STAGES for block, depth in SHAPES]
    wanted = list(present.items())
    return wanted + [(how, x) for x, how in itertools.product(others, PRECISIONS) if x != present[how]]


@contextlib.contextmanager
def _compiling(
    wanted: Sequence[tuple[str, tuple[int, ...]]], end: float, processes: int = PROCESSES
) -> Iterator[list[Compiled]]:
    """Compiles them in processes of their own, into Triton's cache, where those that are timed are found.

    In the process that times them, one after the other, only a few would be compiled in a minute.
    """
    major, minor = (9, 0) if REHEARSAL else torch.cuda.get_device_capability()
    paths = [str(HELPERS), *sys.path]
    env = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(paths),
    }

    def run(how: str, tried: tuple[int, ...]) -> dict[str, dict[str, int]]:
        command = [sys.executable, "-m", "speed.gpu_tiles", f"{major}{minor}", how, *map(str, tried)]
        try:
            left = max(end - time.monotonic(), 0.1)
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=left)
        except subprocess.TimeoutExpired:
            raise TimeoutError from None
        if done.returncode:
            raise RuntimeError((done.stderr.strip().splitlines() or ["nothing said"])[-1])
        resources: dict[str, dict[str, int]] = json.loads(done.stdout)
        return resources

    pool = ThreadPoolExecutor(min(processes, os.cpu_count() or 1))
    try:
        yield [pool.submit(run, *pair) for pair in wanted]
    finally:
        pool.shutdown(cancel_futures=True)  # those that run end with the time


def compile_tile(capability: str, how: str, *numbers: str) -> None:
    """Prints what the kernels of one candidate use, as JSON by name."""
    import triton_cases  # both of the tests
    import triton_compile

    from fastkd.kernels.fsp import view

    view.TILES[how] = view.Tiles(*map(int, numbers))
    dtype, precision = _of(how)
    case = "fsp tiles"
    triton_cases.CASES[case] = lambda: triton_cases.fsp(triton_cases.RESNET50, dtype, 64, precision)
    (said,) = triton_compile.report(int(capability), [case])
    print(json.dumps({kernel["name"]: kernel["resources"] for kernel in said["kernels"]}))


def _registers(used: dict[str, dict[str, int]]) -> str:
    kernels = (f"{name} {of['REG']} registers, {of['STACK']} bytes of stack" for name, of in used.items())
    return "; ".join(kernels)


def _numbers(tried: tuple[int, ...]) -> str:
    """Those of a line of the table: the last are left out where gradients have none of their own."""
    most = max(i for i, number in enumerate(tried, 1) if number)
    return ", ".join(map(str, tried[:most]))


def _tile_line(how: str, tried: tuple[int, ...]) -> str:
    return f'    "{how}": Tiles({_numbers(tried)}),'


def _clear_plans() -> None:
    from fastkd.kernels.fsp import forward, gradient

    forward._plans.clear()
    gradient._plans.clear()


def _of(how: str) -> tuple[torch.dtype, str | None]:
    """The features' dtype, and ``precision``."""
    return (torch.bfloat16, None) if how == "bf16" else (torch.float32, how)


def _fsp_seconds(how: str, students: Features, teachers: Features) -> float:
    _clear_plans()
    dtype, precision = _of(how)
    s, t = ([x.detach().to(DEVICE, dtype) for x in side] for side in (students, teachers))
    s = [x.requires_grad_() for x in s]

    def step() -> None:
        torch.autograd.grad(fastkd.fsp_loss(s, t, precision=precision), s)

    with fastkd.use_backend("triton"):
        return seconds_of(step, 1 if REHEARSAL else 5, 1 if REHEARSAL else 4)


if __name__ == "__main__":
    compile_tile(*sys.argv[1:])
