"""Which tiles of Triton's FSP kernels are the fastest on a GPU."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from concurrent.futures import Future
from pathlib import Path

import pytest


def test_the_fastest_tiles_are_printed_and_the_table_is_as_it_was(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    view = pytest.importorskip("fastkd.kernels.fsp.view")
    from speed import gpu_tiles

    def seconds(how: str, *features: object) -> float:
        return 1.0 if view.TILES[how][:3] == (64, 32, 3) and how == "tf32" else 2.0

    @contextlib.contextmanager
    def compiling(wanted: list, end: float):
        futures = []
        for _, (_, _, stages, *_) in wanted:
            futures.append(Future())
            if stages == 4:
                futures[-1].set_exception(RuntimeError("out of resource: shared memory"))
            else:
                futures[-1].set_result({"fsp_loss_kernel": {"REG": 200, "STACK": 8}})
        yield futures

    before = dict(view.TILES)
    monkeypatch.setattr(gpu_tiles, "_fsp_seconds", seconds)
    monkeypatch.setattr(gpu_tiles, "_compiling", compiling)
    monkeypatch.setattr(gpu_tiles, "features", lambda case: ([], []))
    monkeypatch.setenv("FASTKD_GPU_OUT", str(tmp_path))
    gpu_tiles.tiles("60")
    said = capsys.readouterr().out
    assert '    "tf32": Tiles(64, 32, 3),  # 1000.000 ms; at present 2000.000' in said
    assert '    "bf16": Tiles(128, 32, 2),  # 2000.000 ms' in said
    assert "bf16 (128, 32, 4): RuntimeError: out of resource" in said
    assert "tf32 (64, 32, 3): 1000.000 ms; fsp_loss_kernel 200 registers, 8 bytes of stack" in said
    assert before == view.TILES and "tf32" in json.loads((tmp_path / "tiles.json").read_text())


@pytest.mark.slow
def test_candidates_are_compiled_at_resnet50_stages_as_they_will_be_launched(monkeypatch) -> None:
    view = pytest.importorskip("fastkd.kernels.fsp.view")
    from speed import gpu_tiles

    monkeypatch.setattr(gpu_tiles, "REHEARSAL", True)

    tried = view.Tiles(64, 32, 1)
    with gpu_tiles._compiling([("bf16", tried)], time.monotonic() + 300) as (kernels,):
        used = kernels.result()
    assert used.keys() == {"fsp_loss_kernel", "fsp_gradient_kernel"}
    assert all(of["LOCAL"] == 0 and of["REG"] > 100 for of in used.values()), used


def test_what_does_not_compile_in_time_is_told(tmp_path: Path, monkeypatch, capsys) -> None:
    pytest.importorskip("fastkd.kernels.fsp.view")
    from speed import gpu_tiles

    monkeypatch.setattr(gpu_tiles, "REHEARSAL", True)
    monkeypatch.setattr(gpu_tiles, "features", lambda case: ([], []))
    monkeypatch.setenv("FASTKD_GPU_OUT", str(tmp_path))
    gpu_tiles.tiles("0.2")
    assert capsys.readouterr().out == "tf32 (128, 32, 2) and what follows: no time\n"


def test_tiles_are_compiled_by_as_many_processes_as_the_part_says(monkeypatch) -> None:
    pytest.importorskip("fastkd.kernels.fsp.view")
    from speed import gpu_parts, gpu_plan, gpu_tiles

    asked: list[tuple[int, int]] = []

    @contextlib.contextmanager
    def compiling(wanted: list, end: float, processes: int):
        asked.append((round(end - time.monotonic()), processes))
        yield []

    part = gpu_plan.compiling(rehearse=False)[-1]
    monkeypatch.setattr(gpu_tiles, "_compiling", compiling)
    monkeypatch.setattr(gpu_parts, "REHEARSAL", False)
    monkeypatch.setattr(sys, "argv", [*part.command[part.command.index("speed.gpu_parts") :]])
    assert gpu_parts.main() == 0 and asked == [(gpu_plan.TILES_SECONDS, part.processes)]
