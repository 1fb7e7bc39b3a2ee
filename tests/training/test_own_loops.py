"""The examples: a loop of one's own, accelerate, Lightning, several processes."""

from __future__ import annotations

import ast
import copy
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from teacher_cases import MEAN, STEPS, VARIANCE, seen_much, statistics

import fastkd

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def trained(torchvision, monkeypatch):
    """The examples' teacher has statistics as training leaves them: a reset would show."""
    models = torchvision.models
    new = models.resnet34
    monkeypatch.setattr(models, "resnet34", lambda **options: seen_much(new(**options)))


def example(name, **arguments):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](**arguments)


def check(distillation):
    """A trained student, and a teacher that is as it was and nowhere to be found."""
    teacher = distillation.teacher
    assert teacher not in set(distillation.modules()) and len(list(teacher.parameters())) > 100
    assert all(name.startswith(("student.", "methods.")) for name in distillation.state_dict())
    assert statistics(teacher) == [{MEAN}, {VARIANCE}, {STEPS}] and not teacher.training
    assert distillation.student.bn1.num_batches_tracked == 4
    assert all(p.grad is not None for p in distillation.student.parameters())


def test_a_plain_loop(trained, monkeypatch):
    """Whose autocast is entered anew in each step: it keeps copies of the weights as long as it is on."""
    on = {"forward": [], "step": []}
    forward, step = fastkd.Distillation.forward, torch.optim.SGD.step

    def watch(name, whole):
        def watched(self, *arguments, **options):
            on[name].append(torch.is_autocast_enabled("cpu"))
            return whole(self, *arguments, **options)

        return watched

    monkeypatch.setattr(fastkd.Distillation, "forward", watch("forward", forward))
    monkeypatch.setattr(torch.optim.SGD, "step", watch("step", step))
    check(example("plain_loop"))
    assert on == {"forward": [True] * 4, "step": [False] * 4}


def test_no_example_holds_its_loop_in_one_region_of_autocast():
    """Nor a loop of docs/own-networks.md, which does without: a `with` around a `for` is one."""
    page = (EXAMPLES.parent / "docs" / "own-networks.md").read_text(encoding="utf-8")
    texts = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    texts += [file.read_text(encoding="utf-8") for file in EXAMPLES.glob("*.py")]
    assert sum("backward(" in text for text in texts) >= 4
    for text in texts:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.With) and "autocast" in ast.unparse(node.items[0]):
                assert not any(isinstance(inner, (ast.For, ast.While)) for inner in ast.walk(node))


def test_accelerate(trained, accelerate):
    check(example("with_accelerate"))


def test_lightning(trained, lightning, tmp_path):
    averaging = lightning.pytorch.callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    model = example("with_lightning", epochs=3, callbacks=[averaging], default_root_dir=tmp_path)
    assert not [name for name in model.state_dict() if "teacher" in name]
    assert statistics(model.distillation.teacher) == [{MEAN}, {VARIANCE}, {STEPS}]
    clone = copy.deepcopy(model.distillation.eval())
    assert clone.teacher is not model.distillation.teacher


# what torchrun starts: the example's own main, then what each process has
WORKER = """
import runpy, sys, torch
from torch import distributed

made = runpy.run_path(sys.argv[1])["main"]()
weights = torch.cat([parameter.detach().flatten() for parameter in made.student.parameters()])
others = [torch.empty_like(weights) for _ in range(distributed.get_world_size())]
distributed.all_gather(others, weights)
counts = made.student.bn1.num_batches_tracked.item(), made.teacher.bn1.num_batches_tracked.item()
equal = all(torch.equal(weights, x) for x in others)
print(f"rank {distributed.get_rank()}: students equal {equal},", *counts)
distributed.destroy_process_group()
"""


def in_two_processes(folder, *arguments):
    """What each of two says of itself, in order."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**variables, "ACCELERATE_USE_CPU": "true"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return sorted(line for line in done.stdout.splitlines() if line.startswith("rank"))


@pytest.mark.slow
def test_several_processes(torchvision, tmp_path):
    found = in_two_processes(tmp_path, EXAMPLES / "with_ddp.py")
    assert found == ["rank 0: students equal True", "rank 1: students equal True"]


@pytest.mark.slow
def test_accelerate_in_two_processes(torchvision, accelerate, tmp_path):
    """Which refuse a teacher that is prepared alone. Each has four of the eight images: a batch an epoch."""
    (tmp_path / "worker.py").write_text(WORKER)
    found = in_two_processes(tmp_path, "worker.py", EXAMPLES / "with_accelerate.py")
    assert found == [f"rank {rank}: students equal True, 2 0" for rank in (0, 1)]
