"""Which tiles of Triton's FSP kernels are the fastest on a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def test_the_fastest_tiles_are_printed_and_the_table_is_as_it_was(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    view = pytest.importorskip("fastkd.kernels.fsp.view")
    from speed import gpu_tiles

    def seconds(how: str, *features: object) -> float:
        block, depth, stages = view.TILES[how][:3]
        if stages == 4:
            raise RuntimeError("out of resource: shared memory")
        return 1.0 if (block, depth, stages) == (64, 32, 3) and how == "tf32" else 2.0

    before = dict(view.TILES)
    monkeypatch.setattr(gpu_tiles, "_fsp_seconds", seconds)
    monkeypatch.setattr(gpu_tiles, "features", lambda case: ([], []))
    monkeypatch.setenv("FASTKD_GPU_OUT", str(tmp_path))
    gpu_tiles.tiles("60")
    said = capsys.readouterr().out
    assert '    "tf32": Tiles(64, 32, 3),  # 1000.000 ms; at present 2000.000' in said
    assert '    "bf16": Tiles(128, 32, 2),  # 2000.000 ms' in said
    assert "bf16 (128, 32, 4): RuntimeError: out of resource" in said
    assert before == view.TILES and "tf32" in json.loads((tmp_path / "tiles.json").read_text())
