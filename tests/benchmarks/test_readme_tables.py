"""README's tables of speed: of a CPU, and of the newest results of a GPU that lie beside it."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import report
from speed import readme

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CPU, GPU = re.findall(r"\[of a [CG]PU\]\(([\w/.-]+)\.md\)", README)


def committed(file: str) -> dict[str, Any]:
    return json.loads((ROOT / f"{file}.json").read_text(encoding="utf-8"))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Those of a CPU and of two days of a GPU, as they are committed, and a page between whose markers the
    tables go.
    """
    of_gpu = committed(GPU)
    older = {**copy.deepcopy(of_gpu), "gpu": "An older GPU", "date": "2001-01-01T00:00:00+00:00"}
    for name, result in {"cpu": committed(CPU), "gpu": of_gpu, "older": older}.items():
        (tmp_path / "results" / name).mkdir(parents=True)
        (tmp_path / "results" / name / "speed.json").write_text(json.dumps(result))
    (tmp_path / "README.md").write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    return tmp_path / "results"


def written(results: Path, of: str = "cpu") -> str:
    page = results.parent / "README.md"
    report.main([str(results / of / "speed.json"), "--readme", str(page), "--no-plot"])
    return page.read_text(encoding="utf-8")


def tables(text: str) -> list[list[dict[str, str]]]:
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        heads, _, *rows = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()
        ]
        found.append([dict(zip(heads, row, strict=True)) for row in rows])
    return found


def test_one_command_writes_both_tables(results: Path) -> None:
    text = written(results)
    assert text.startswith(f"before\n{report.BEGIN}\n") and text.endswith(f"{report.END}\nafter\n")
    assert "NVIDIA H200; Intel" in text and "An older GPU" not in text and "old\n" not in text
    of_cpu, of_gpu = tables(text)
    assert {row["network-batch"] for row in of_cpu} >= {"resnet20-64"} and "cpp" in of_cpu[0]
    assert [(row["loss"], row["network-batch"], row["clock"]) for row in of_gpu] == [
        ("AT", "resnet20-128", "wall clock"),
        ("AT", "resnet20-128", "CUDA graph"),
        ("AT", "resnet50-64", "CUDA graph, cold cache"),
    ]
    groups = committed(GPU)["groups"]
    for row in of_gpu:
        (times,) = (
            {name: entry["milliseconds"] for name, entry in group["rows"].items()}
            for group in groups
            if (group["shape"], readme.CLOCKS[group["clock"]]) == (row["network-batch"], row["clock"])
        )
        for name in ("eager", "torch.compile", "triton", "cuda"):
            assert float(row[name]) == pytest.approx(times[name], rel=0.05)
        for name in ("triton", "cuda"):
            for slow in ("eager", "torch.compile"):
                wanted = times[slow] / times[name]
                assert float(row[f"{slow} ÷ {name}"]) == pytest.approx(wanted, rel=0.01)
    assert text.splitlines()[-3].endswith(
        "[of a CPU](results/cpu/speed.md), [of a GPU](results/gpu/speed.md)."
    )
    assert written(results) == text


def test_without_results_of_a_gpu_there_is_one_table(results: Path) -> None:
    for name in ("gpu", "older"):
        (results / name / "speed.json").unlink()
    text = written(results)
    assert len(tables(text)) == 1 and "of a GPU" not in text


def test_what_was_measured_on_a_busy_machine_is_left_out(results: Path) -> None:
    busy = committed(GPU)
    for group in busy["groups"]:
        group["waiting"] = 3.0
    (results / "gpu" / "speed.json").write_text(json.dumps(busy))
    assert len(tables(written(results))) == 1


def test_results_of_a_gpu_alone_do_not_replace_those_of_a_cpu(results: Path) -> None:
    with pytest.raises(SystemExit, match="has no groups of a CPU"):
        written(results, "gpu")
    assert "old\n" in (results.parent / "README.md").read_text()


def test_columns_of_a_gpu_are_none_of_a_cpus(results: Path) -> None:
    """A machine with a GPU measures both in one run."""
    both = committed(CPU)
    both["groups"] += committed(GPU)["groups"]
    both["gpu"], both["date"] = "Some GPU", "2099-01-01T00:00:00+00:00"
    (results / "cpu" / "speed.json").write_text(json.dumps(both))
    of_cpu, of_gpu = tables(written(results))
    assert not {"triton", "cuda"} & {*of_cpu[0]} and "cpp" not in of_gpu[0]


def test_a_row_that_failed_has_no_time(results: Path) -> None:
    result = committed(GPU)
    result["groups"][0]["rows"]["cuda"] = {"failed": "wrong: relative error 3"}
    (results / "gpu" / "speed.json").write_text(json.dumps(result))
    row = tables(written(results))[1][0]
    assert row["cuda"] == row["eager ÷ cuda"] == "–" != row["eager ÷ triton"]


def test_readme_has_what_the_command_writes(results: Path) -> None:
    """The tables; README's own links lead elsewhere."""
    between = README.partition(report.BEGIN)[2].partition(report.END)[0]
    assert tables(between) == tables(written(results))
