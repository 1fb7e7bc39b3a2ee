"""A run killed after its first epoch ends with the bits of a run that was not, whatever the method."""

from __future__ import annotations

import signal

import pytest
import torch
from record_files import rows_of
from runs import check_same
from support_data import QUICK

from fastkd.methods import METHODS
from fastkd.models import load_student

# the terms of a sum do not meet, so one run stands for several methods
SUM = ["--recipe", "digits", "--option", "ce.weight=1", "--option", "kd.weight=1"]
RUNS = {
    "dkd+fitnet+at+ofd+rkd+crd+kd": [*SUM, "--option", "crd.k=20", "--teacher-mode", "train"],
    "reviewkd+srrl+afd+semckd+sakd": [*SUM, "--new-optimizer", "--option", "semckd.beta=4"],
    "simkd": [],
    "norm+kd": [],
    "fitnet+fsp": ["--option", "fitnet.phases=2", "--init-epochs", "1"],
}  # fmt: skip
NECKS = {"simkd": "Projector", "norm+kd": "Pair"}


@pytest.fixture(scope="module")
def teacher(nursery, tmp_path_factory):
    """A checkpoint that all runs learn from."""
    output = tmp_path_factory.mktemp("teacher") / "runs"
    status, text = nursery.run(output, ["--method", "baseline", *QUICK, "--epochs", "1"])
    assert status == 0, text
    return output / rows_of(output)[0]["folder"] / "best.pt"


def test_every_method_is_in_one_of_the_runs():
    assert {term for name in RUNS for term in name.split("+")} == {*METHODS[1:]}


@pytest.mark.parametrize(
    "name", [name if name == "norm+kd" else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]
)
def test_a_run_killed_after_an_epoch_ends_with_the_same_bits(nursery, teacher, tmp_path, name):
    flags = ["--method", name, *QUICK, "--epochs", "2", "--teacher-checkpoint", str(teacher), *RUNS[name]]
    whole, ours = tmp_path / "whole" / "runs", tmp_path / "runs"
    whole.parent.mkdir()
    status, text = nursery.run(whole, flags)
    assert status == 0, text
    # the first files are a probe, configuration, command, those of an epoch; then the next epoch's last.pt
    status, text = nursery.run(ours, flags, die_at=6 + 2 * ("--init-epochs" in flags))
    assert status == -signal.SIGKILL, text
    status, text = nursery.run(ours, [*flags, "--resume"])
    assert status == 0 and "goes on after epoch 1 of 2" in text, text
    check_same(ours, whole)
    one, other = (load_student(output / rows_of(output)[0]["folder"]) for output in (ours, whole))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(one(images), other(images)) and type(one.neck).__name__ == NECKS.get(name, "Identity")
