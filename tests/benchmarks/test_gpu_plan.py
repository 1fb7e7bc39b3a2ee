"""What benchmarks/gpu.py would run: each part has something to do, and the whole has time for it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path

import gpu
import gpu_command
import pytest
import torch
from _pytest.mark.expression import Expression
from speed import gpu as speed_gpu
from speed import gpu_methods, gpu_plan, gpu_step
from speed.gpu import GPUGroup
from speed.gpu_run import Part
from speed.session import DEVICE, Entry, Group

pytestmark = pytest.mark.skipif(os.name != "posix", reason="process groups are POSIX's")
ROOT = Path(__file__).resolve().parents[2]


def ran(out: Path, part: Part) -> dict:
    return gpu_command.ran(out, [part], minutes=5)["parts"][0]


def test_a_test_file_that_lacks_a_package_keeps_no_other_from_running(tmp_path: Path) -> None:
    (tmp_path / "test_lacks.py").write_text("import a_package_that_is_not_there")
    (tmp_path / "test_runs.py").write_text("def test_it(): pass")
    part = gpu_plan.pytest_part("tests", 20, "-c", "/dev/null", str(tmp_path))
    assert ran(tmp_path / "out", part)["last"].startswith("1 passed, 1 error in")


def test_what_this_machine_lacks_is_told(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpu_plan, "CUDA", ())
    monkeypatch.setattr(gpu_plan, "find_spec", lambda name: None)
    words = ("compute-sanitizer", "--data", "pytest", "xdist")
    for line, word in zip(gpu_plan.left_out(tmp_path, rehearse=False), words, strict=True):
        assert word in line
    names = [part.name for part in gpu_plan.plan(rehearse=False)]
    assert "memcheck" not in names and "smoke cuda" in names


def test_eight_minutes_reach_the_first_measurements() -> None:
    parts = gpu.plan(rehearse=False)
    names = [part.name for part in parts]
    # compute-sanitizer is not on every machine
    before = sum(part.seconds for part in parts[: names.index("speed: fsp chains")]) + (
        0 if "memcheck" in names else 90
    )
    assert before <= 8 * 60 and names.index("smoke cuda") < names.index("smoke triton") < names.index(
        "tests of cuda"
    )
    assert not any(part.measures for part in parts[: names.index("launches")]) and all(
        p.measures for p in parts[names.index("launches") :]
    )


@pytest.mark.parametrize("rehearse", [True, False])
def test_each_speed_part_has_groups_to_measure(rehearse: bool, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: not rehearse)
    device = "cpu" if rehearse else "cuda"
    groups: dict[str, list[Group]] = {
        name: [GPUGroup(case, not rehearse) for case in speed_gpu.cases(name, not rehearse)]
        for name in ("attention", "fsp")
    }
    models = (gpu_step.RESNET20, gpu_step.RESNET50)
    groups["step"] = [gpu_step.GPUStepGroup(model, device, not rehearse) for model in models]
    groups["methods"] = [*gpu_methods.groups(not rehearse)]
    parts = [part for part in gpu_plan.plan(rehearse) if part.name.startswith("speed: ")]
    assert len(parts) == len(gpu_plan.SPEED)
    for part in parts:
        words = Expression.compile(part.command[part.command.index("-k") + 1])
        file = Path(part.command[-1]).stem.removeprefix("test_")
        ids = [Entry(group, DEVICE, "eager").id for group in groups[file]]
        assert any(words.evaluate(lambda word, id=id: word in id) for id in ids), (part.name, ids)


def test_parts_say_how_many_processes_they_have(monkeypatch) -> None:
    """No more than there are processors."""
    two = {"tests of cuda": 2, "tests of triton": 2}
    for xdist, processors, wanted in (
        (object(), 16, {"tests of cuda": 5, "tests of triton": 10}),
        (object(), 2, two),
        (None, 16, {}),
    ):
        monkeypatch.setattr(gpu_plan, "find_spec", lambda name, xdist=xdist: xdist)
        monkeypatch.setattr(gpu_plan.os, "cpu_count", lambda processors=processors: processors)
        for part in gpu_plan.plan(rehearse=False):
            assert part.processes == wanted.get(part.name, 1), part.name
            assert not xdist or part.name not in wanted or option(part, "-n") == str(part.processes)


def test_a_rehearsal_compiles_the_same_parts() -> None:
    """The most telling first, the tiles last; beside checks, so with few processes, which yield to others."""
    real, small = gpu_plan.compiling(rehearse=False), gpu_plan.compiling(rehearse=True)
    names = [f"compiling for {group[0]}" for group in gpu_plan.SPEED]
    assert [part.name for part in real] == [part.name for part in small] == [*names, "compile-tiles"]
    for part in (*real, *small):
        threads = dict(part.variables)["TORCHINDUCTOR_COMPILE_THREADS"]
        assert part.command[0] == "nice" and part.processes == int(threads) == 2 and not part.measures
    measured = [part.command for part in gpu_plan.plan(rehearse=True) if part.name.startswith("speed: ")]
    assert [part.command[1:] for part in small[:-1]] == measured
    assert not any("--benchmark-results" in part.command for part in real)


@pytest.mark.parametrize("processes", [0, 2])
def test_a_part_that_selects_no_test_has_failed(tmp_path: Path, processes: int) -> None:
    if processes and not find_spec("xdist"):
        pytest.skip("pytest-xdist is not installed")
    (tmp_path / "test_one.py").write_text("def test_one(): pass")
    place = ("-c", "/dev/null", str(tmp_path))
    for words, status in (("one", 0), ("another", 5)):
        part = gpu_plan.pytest_part("tests", 60, *place, "-k", words, processes=processes)
        assert ran(tmp_path / "out", part)["status"] == status


COLLECT = """
import json, pathlib, sys
import pytest

class Keep:
    def pytest_collection_modifyitems(self, items):
        found = [[item.nodeid, [mark.name for mark in item.iter_markers()]] for item in items]
        pathlib.Path(sys.argv[1]).write_text(json.dumps(found))

sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "--collect-only", *sys.argv[2:]], plugins=[Keep()]))
"""


def option(part: Part, name: str) -> str:
    words = part.command[3:]  # after: python -m pytest
    return words[words.index(name) + 1]


@pytest.mark.slow
def test_each_part_of_tests_selects_some(tmp_path: Path) -> None:
    """Of those that are marked where there is no GPU: with one, grids of the operations have the mark too."""
    file = tmp_path / "collected.json"
    command = [sys.executable, "-c", COLLECT, str(file), *gpu_plan.PLACES]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    items: list[tuple[str, list[str]]] = json.loads(file.read_text())

    def chosen(marks: str, words: str = "test") -> list[str]:
        wanted, named = Expression.compile(marks), Expression.compile(words)
        found = [id for id, has in items if wanted.evaluate(lambda name, has=has: name in has)]
        return [id for id in found if named.evaluate(lambda word, id=id: word in Path(id).name.lower())]

    parts = {part.name: part for part in gpu_plan.plan(rehearse=False)}
    cuda, triton = (
        chosen(option(parts[name], "-m"), option(parts[name], "-k"))
        for name in ("tests of cuda", "tests of triton")
    )
    # whatever needs a GPU is run on it: the large ones apart, each other one once
    assert cuda and sorted(cuda + triton) == sorted(chosen("gpu and not large"))
    assert triton == chosen("gpu and not large", "triton")
    large = chosen("gpu and large")
    assert len(large) >= 2 and chosen(option(parts["large tensors"], "-m")) == large
    assert all(id.startswith(gpu_plan.PLACES[0]) for id in large)
    for word in gpu_plan.ON_DEVICE.split(" or "):
        assert chosen("not large", f"triton and {word}"), word
    # it would take those after it along
    assert "no_fault" in items[-1][0] and "no_fault" in triton[-1]
    for part in gpu_plan.plan(rehearse=True):
        if part.name.startswith("tests of"):
            places = [word for word in part.command if word.startswith("tests/")]
            found = chosen("not large", option(part, "-k"))
            assert [id for id in found if id.startswith(tuple(places))], part.name


@pytest.mark.skipif(not find_spec("sklearn"), reason="the digits are scikit-learn's")
def test_the_training_run_has_a_teacher_of_its_own_and_leaves_its_tables(tmp_path: Path) -> None:
    (part,) = gpu_plan.training(None, rehearse=True)
    found = ran(tmp_path, dataclasses.replace(part, seconds=240))
    assert found["status"] == 0, found
    with tarfile.open(tmp_path / "gpu-results.tar.gz") as archive:
        names = archive.getnames()
        tables = {
            name: archive.extractfile(name).read().decode() for name in names if name.endswith("results.csv")
        }
    at, teacher = (
        next(text for name, text in tables.items() if f"{folder}/results.csv" in name)
        for folder in ("runs", "teacher")
    )
    assert ",at," in at and ",baseline," in teacher and not any(name.endswith(".pt") for name in names)
