"""Other tiles for FSP by Triton, timed on a GPU."""

from __future__ import annotations

import itertools
import time

import torch

import fastkd
from speed.cases import Case, features
from speed.gpu import LARGE
from speed.gpu_device import DEVICE, REHEARSAL, Features, save, seconds_of


def tiles(seconds: str = "60") -> None:
    """FSP by Triton at the ResNet-50 stages, forward and backward, with other tiles: prints the lines for
    ``view.TILES``.

    Tries as many as there is time for, the present one first; passes over one that does not compile.
    """
    from fastkd.kernels.fsp import view

    end = time.monotonic() + float(seconds)
    found: dict[str, dict[str, float]] = {}
    candidates = [
        view.Tiles(block, depth, stages)
        for stages in (3, 4, 1, 2)
        for block, depth in ((128, 32), (64, 32), (128, 16))
    ]
    present = {how: view.TILES[how] for how in ("tf32", "bf16")}
    students, teachers = features(Case("fsp", "small" if REHEARSAL else LARGE))
    try:
        for number, how in itertools.product(range(1 + len(candidates)), present):
            tried = [present[how], *candidates][number]
            if time.monotonic() > end or (number and tried == present[how]):
                continue
            view.TILES[how] = tried
            try:
                found.setdefault(how, {})[_tile_line(how, tried)] = (
                    _fsp_seconds(how, students, teachers) * 1e3
                )
            except Exception as error:
                why = " ".join(str(error).split())[:120]
                print(f"{how} ({_numbers(tried)}): {type(error).__name__}: {why}", flush=True)
                continue
            print(f"{how} ({_numbers(tried)}): {found[how][_tile_line(how, tried)]:.3f} ms", flush=True)
            save("tiles", found)
    finally:
        view.TILES.update(present)
        _forget_plans()
    for times in found.values():
        best = min(times, key=times.__getitem__)
        print(f"{best}  # {times[best]:.3f} ms; at present {next(iter(times.values())):.3f}")


def _numbers(tried: tuple[int, ...]) -> str:
    """Those of a line of the table: the last is left out where gradients have no stages of their own."""
    return ", ".join(map(str, tried if tried[-1] else tried[:-1]))


def _tile_line(how: str, tried: tuple[int, ...]) -> str:
    return f'    "{how}": Tiles({_numbers(tried)}),'


def _forget_plans() -> None:
    from fastkd.kernels.fsp import forward, gradient

    forward._plans.clear()
    gradient._plans.clear()


def _fsp_seconds(how: str, students: Features, teachers: Features) -> float:
    _forget_plans()
    dtype, precision = (torch.bfloat16, None) if how == "bf16" else (torch.float32, how)
    s, t = ([x.detach().to(DEVICE, dtype) for x in side] for side in (students, teachers))
    s = [x.requires_grad_() for x in s]

    def step() -> None:
        torch.autograd.grad(fastkd.fsp_loss(s, t, precision=precision), s)

    with fastkd.use_backend("triton"):
        return seconds_of(step, 1 if REHEARSAL else 5, 1 if REHEARSAL else 4)
