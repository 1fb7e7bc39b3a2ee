"""What benchmarks/gpu.py and the tables make of results as the benchmarks on a GPU save them."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import gpu
import pytest
import report
import torch
from speed import gpu as speed_gpu
from speed import gpu_device, gpu_methods, gpu_parts, gpu_step, gpu_summary, methods, session, table
from speed.gpu import GRAPH, WALL, GPUGroup
from speed.gpu_methods import GPUMethodGroup
from speed.measure import Row
from speed.session import DEVICE, Entry, Session, save

import fastkd

MILLISECONDS = {"published": 4.0, "fastkd, reference": 2.0, "fastkd, triton": 0.5}


class OnCPU(GPUMethodGroup):
    """A group that calls itself one of a GPU, with clocks that show what is written above."""

    def names(self, one_thread: bool) -> list[str]:
        return [*MILLISECONDS]

    def row(self, built: Any, name: str) -> Row:
        row = super().row(built, "published")
        faster = 2 if self.clock == GRAPH else 1
        row.name, row.turn = name, lambda calls, warm, clock: MILLISECONDS[name] / faster / 1e3
        return row

    def check(self, built: Any, row: Row) -> None:
        super().check(built, row)
        row.facts["extra_memory"] = 2_000_000
        if self.method == "crd" and row.name.endswith("triton"):
            raise ValueError("no such kernel")

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "device": "cuda"}


@pytest.fixture
def result(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Of a session that measured RKD by two clocks, and CRD, one row of which fails."""
    monkeypatch.setattr(session, "SECONDS", 0.01)
    found = Session(True, lambda text: None)
    small = {"batch": 3, "size": 20, "k": 7, "width": 5}
    groups = [OnCPU(methods.rkd, {"batch": 5, "width": 3}, clock, True) for clock in (WALL, GRAPH)]
    try:
        for group in (*groups, OnCPU(methods.crd, small, WALL, True)):
            found._measure(Entry(group, DEVICE, "published"))
        return json.loads(json.dumps(found.result(["pytest"])))
    finally:
        found.close()


def test_the_summary_has_each_rows_milliseconds_and_ratios(result: dict[str, Any], tmp_path: Path) -> None:
    with gpu.Run(tmp_path / "out", 1, rehearse=True) as run:
        save(result, run.staging / "speed" / "losses-of-embeddings")
        run.pack()
    speed = json.loads((tmp_path / "out" / "gpu-summary.json").read_text())["speed"]
    assert list(speed) == [
        "rkd batch 5, width 3 cuda wall",
        "rkd batch 5, width 3 cuda graph",
        "crd N 20, K 7, batch 3, width 5 cuda wall",
    ]
    rows = speed["rkd batch 5, width 3 cuda graph"]
    assert {name: row["milliseconds"] for name, row in rows.items()} == pytest.approx(
        {"published": 2.0, "fastkd, reference": 1.0, "fastkd, triton": 0.25}
    )
    assert rows["fastkd, triton"]["speedup over published"] == pytest.approx(8)
    assert rows["fastkd, triton"]["speedup over fastkd, reference"] == pytest.approx(4)
    assert "no such kernel" in speed["crd N 20, K 7, batch 3, width 5 cuda wall"]["fastkd, triton"]["failed"]


def test_no_two_groups_have_the_same_name_in_the_summary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    groups: list[Any] = [
        GPUGroup(case, True) for kind in ("attention", "fsp") for case in speed_gpu.cases(kind, True)
    ]
    groups += [gpu_step.GPUStepGroup(model, "cuda", True) for model in (gpu_step.RESNET20, gpu_step.RESNET50)]
    groups += gpu_methods.groups(True)
    names = [gpu_summary.named(group.describe()) for group in groups]
    assert len({*names}) == len(names) == len(groups) > 30
    assert "attention resnet20-128 float32 nchw ieee cuda graph" in names
    assert "AT, resnet50, batch 64, channels_last bfloat16 autocast cuda wall" in names


def test_results_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    with gpu.Run(tmp_path / "out", 1, rehearse=True) as run:
        save({"device": "cuda", "records": []}, run.staging / "speed" / "fsp-chains")
        run.pack()
    speed = json.loads((tmp_path / "out" / "gpu-summary.json").read_text())["speed"]
    assert speed == {"fsp-chains": "not read: KeyError: 'groups'"}


def test_each_row_of_a_method_has_a_column(result: dict[str, Any]) -> None:
    heads, rows = table.methods(result)
    assert heads[:6] == ["method", "case", "thr", "published", "fastkd, reference", "fastkd, triton"]
    lines = [dict(zip(heads, row, strict=True)) for row in rows]
    assert [line["thr"] for line in lines] == ["GPU, wall", "GPU, graph", "GPU, wall"]
    first = lines[0]
    assert (first["published"], first["fastkd, triton"]) == ("4.00", "0.50")
    assert (first["÷ fastkd, reference"], first["÷ fastkd, triton"]) == ("2.00", "8.00")
    assert first["published MB"] == first["fastkd, triton MB"] == "2.0" and first["error"]
    assert (lines[2]["fastkd, triton"], lines[2]["÷ fastkd, triton"]) == ("WRONG", "")
    assert "÷ fastkd, triton" in report.full(result) and "÷ fastkd, triton" in "\n".join(table.lines(result))


def test_a_table_of_one_row_of_ours_says_so_once(result: dict[str, Any]) -> None:
    """As on a CPU, and where both were measured: nothing is said of a row that was not."""
    rows = {"published": {"milliseconds": 6}, "fastkd": {"milliseconds": 2, "error": {"loss": 1e-7}}}
    record = {"method": "ofd", "case": "batch 64", "threads": 1, "clock": "process", "rows": rows}
    alone = table.methods({**result, "groups": [record]})
    assert alone == (
        ["method", "case", "thr", "published", "fastkd", "÷", "error"],
        [["ofd", "batch 64", "1", "6.00", "2.00", "3.00", "1e-07"]],
    )
    heads, lines = table.methods({**result, "groups": [record, *result["groups"]]})
    first = dict(zip(heads, lines[0], strict=True))
    assert (first["fastkd"], first["÷"], first["÷ fastkd, triton"]) == ("2.00", "3.00", "")


def test_steps_on_a_gpu_say_so() -> None:
    record = {"step": "AT", "precision": "bf16", "device": "cuda", "threads": 2, "clock": "graph", "rows": {}}
    assert table.steps({"groups": [record]})[1] == [["AT", "bf16", "GPU, graph"]]


def test_a_case_has_one_spelling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    on_cpu = {(group.method, group.note) for group in methods.groups(True)}
    on_gpu = {(group.method, group.note) for group in gpu_methods.groups(True)}
    assert {note for _, note in on_cpu & on_gpu} == {
        "N 50000, K 16384, batch 64",
        "batch 64, width 64",
        "batch 256, width 512",
    }
    assert ("dkd", "batch 64, 100 classes") in on_cpu and ("afd", "batch 64") in on_cpu


def test_kernels_are_counted_of_each_loss_that_has_some(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """docs/backends.md says how many there are of each; on a CPU what PyTorch dispatches is counted."""
    for name in ("REHEARSAL", "DEVICE"):
        monkeypatch.setattr(gpu_parts, name, {"REHEARSAL": True, "DEVICE": "cpu"}[name])
    monkeypatch.setattr(gpu_device, "REHEARSAL", True)
    monkeypatch.setenv("FASTKD_GPU_OUT", str(tmp_path))
    monkeypatch.setattr(gpu_parts, "serving", lambda: ["triton"])
    # the interpreter is slow, and whoever serves the call is not asked here
    asked: list[str] = []
    monkeypatch.setattr(fastkd, "use_backend", lambda name: asked.append(name) or contextlib.nullcontext())
    gpu_parts.launches()
    found = json.loads((tmp_path / "launches.json").read_text())
    chain, large = speed_gpu.CHAINS[0], speed_gpu.LARGE
    shapes = [f"triton {kind} {shape}" for kind in ("attention", "fsp") for shape in (chain, large)]
    assert list(found) == [*shapes, "triton crd", "triton rkd"] and asked == ["triton"] * 6
    for name, ways in found.items():
        assert list(ways) == ["forward", "backward"] and all(ways.values()), name
    for kind in ("crd", "rkd"):
        assert any(kind in event for event in found[f"triton {kind}"]["forward"]), found
