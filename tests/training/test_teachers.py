"""Teachers: found by their name, or a published one given.

FASTKD_DATA names the folder of the image sets (data), FASTKD_TEACHERS that of published weights
(FASTKD_DATA/teachers).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastkd.training import RECIPES, SETTINGS, Settings
from fastkd.training.config import Config
from fastkd.training.teacher import find_teacher

DATA = Path(os.environ.get("FASTKD_DATA", "data"))
TEACHERS = Path(os.environ.get("FASTKD_TEACHERS", DATA / "teachers"))
PUBLISHED = TEACHERS / "resnet56_cifar100.pth"


@pytest.mark.slow
@pytest.mark.unpoisoned
@pytest.mark.skipif(not PUBLISHED.exists(), reason="FASTKD_TEACHERS has no resnet56_cifar100.pth")
@pytest.mark.skipif(not any(DATA.glob("cifar-100-*")), reason="FASTKD_DATA has no CIFAR-100")
def test_the_published_resnet56_gets_its_published_accuracy(tmp_path, capsys):
    plan = Config(
        Settings("at", setting="a", data=DATA, teacher_checkpoint=PUBLISHED, output=tmp_path, device="cpu")
    )
    assert (plan.models.teacher, plan.models.student, plan.data.name, plan.recipe_name) == (
        "resnet56",
        "resnet20",
        "cifar100",
        "sakd",
    )
    _, accuracy = find_teacher(plan)
    assert f"{accuracy:.2f}" == "73.04" and "73.04 % on the test set" in capsys.readouterr().out


def test_the_letters_are_those_of_the_table():
    pairs = "56>20 56>32 110>20 110>32 110>56 40x2>16x2 110>16x1 110>16x2 40x2>32 40x2>56"
    names = {
        letter: "{}>{}".format(
            *(name.removeprefix("resnet").removeprefix("wrn_").replace("_", "x") for name in pair)
        )
        for letter, pair in SETTINGS.items()
    }
    assert names == dict(zip("abcdefghij", pairs.split(), strict=True))


def test_a_teacher_is_found_by_what_its_training_depends_on(tmp_path):
    def path(method="at", **changes):
        return (
            Config(Settings(method, **{"dataset": "digits", "output": tmp_path, "device": "cpu", **changes}))
            .teacher_path()
            .name
        )

    assert (
        path()
        == path("kd", student="resnet8", overrides={"preset": "kdzoo", "teacher_mode": "train"})
        == "digits-resnet20-digits-8epochs-seed0.pt"
    )
    others = [
        {"teacher": "resnet8"},
        {"recipe": "sakd"},
        {"seed": 1},
        {"overrides": {"epochs": 2}},
        {"overrides": {"lr": 0.1}},
    ]
    assert len({path(), *(path(**other) for other in others)}) == 6
    many = {key: getattr(RECIPES["sakd"], key) for key in RECIPES["sakd"].__dataclass_fields__}
    assert len(path(overrides=many)) < 200
