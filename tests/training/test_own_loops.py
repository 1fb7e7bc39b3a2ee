"""The examples: a loop of one's own, accelerate, Lightning, several processes."""

from __future__ import annotations

import copy
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example(name, **arguments):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](**arguments)


def buffers_of(network):
    return {name: buffer.clone() for name, buffer in network.named_buffers()}


def check(distillation):
    """A trained student, and a teacher that is as it was and nowhere to be found."""
    teacher = distillation.teacher
    assert teacher not in set(distillation.modules()) and len(list(teacher.parameters())) > 100
    assert all(name.startswith(("student.", "methods.")) for name in distillation.state_dict())
    assert teacher.bn1.num_batches_tracked == 0 and not teacher.training
    assert distillation.student.bn1.num_batches_tracked == 4
    assert all(p.grad is not None for p in distillation.student.parameters())


def test_a_plain_loop():
    pytest.importorskip("torchvision")
    distillation = example("plain_loop")
    check(distillation)
    # whatever looks for batch norms to reset finds none of the teacher's
    before = buffers_of(distillation.teacher)
    images = torch.randn(4, 3, 32, 32)
    torch.optim.swa_utils.update_bn([(images,)], distillation)
    assert distillation.student.bn1.num_batches_tracked == 1
    after = buffers_of(distillation.teacher)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_accelerate():
    pytest.importorskip("torchvision")
    pytest.importorskip("accelerate")
    check(example("with_accelerate"))


def test_lightning(tmp_path):
    pytest.importorskip("torchvision")
    lightning = pytest.importorskip("lightning")
    averaging = lightning.pytorch.callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    model = example("with_lightning", epochs=3, callbacks=[averaging], default_root_dir=tmp_path)
    assert not [name for name in model.state_dict() if "teacher" in name]
    assert model.distillation.teacher.bn1.num_batches_tracked == 0
    clone = copy.deepcopy(model.distillation.eval())
    assert clone.teacher is not model.distillation.teacher


@pytest.mark.slow
def test_several_processes(tmp_path):
    pytest.importorskip("torchvision")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(
        [*command, str(EXAMPLES / "with_ddp.py")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=variables,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(line for line in done.stdout.splitlines() if line.startswith("rank")) == [
        "rank 0: students equal True",
        "rank 1: students equal True",
    ]
