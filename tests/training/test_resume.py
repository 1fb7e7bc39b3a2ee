"""A run resumed where it was killed ends with the same bits; one line for what cannot be resumed."""

from __future__ import annotations

import io
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import toy_methods
from record_files import rows_of
from runs import bits, check_same, load
from support_data import QUICK, small_digits

from fastkd import data as datasets
from fastkd.distillation import Distillation
from fastkd.io.files import owned
from fastkd.methods import define
from fastkd.models import create_model
from fastkd.training import Batches, Trainer, get_recipe
from fastkd.training.progress import Progress

ROOT = Path(__file__).resolve().parents[2]
# an initialization phase, a teacher in train mode, an optimizer built anew
SAKD = ["--method", "fsp", "--recipe", "sakd", *QUICK, "--epochs", "3", "--init-epochs", "2"]
HALF = [
    "--method",
    "at+kd",
    "--recipe",
    "hankyul2",
    *QUICK,
    "--epochs",
    "3",
    "--precision",
    "bf16",
    "--deterministic",
]


@pytest.fixture(scope="module")
def whole(nursery, tmp_path_factory):
    """What uninterrupted runs leave, and how long they take."""
    made = {}

    def of(flags):
        key = tuple(flags)
        if key not in made:
            output, begun = tmp_path_factory.mktemp("whole") / "runs", time.perf_counter()
            status, text = nursery.run(output, flags)
            assert status == 0, text
            made[key] = output, time.perf_counter() - begun
        return made[key]

    return of


@pytest.mark.parametrize("flags", [SAKD, HALF], ids=["two phases", "bf16"])
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(nursery, whole, tmp_path, flags):
    reference, seconds = whole(flags)
    # while it writes, which no clock decides, at any time, and after an epoch's end, of which there are 6 or
    # 8
    killers = [{"die_at": random.randint(4, 11)}, {"kill_after": random.uniform(0, 0.5) * seconds}]
    killers += [{"kill_after": random.uniform(0, 0.2) * seconds, "since": " epoch "}]
    assert nursery.taken_up(tmp_path / "runs", flags, killers) >= 1
    check_same(tmp_path / "runs", reference)


# after a probe of the folder, the configuration and the command: checkpoint, log, best weights, table for
# people, table; and with a teacher there, whose row is not yet
@pytest.mark.parametrize(
    ("method", "die_at"), [("baseline", 4), ("baseline", 5), ("baseline", 7), ("baseline", 8), ("kd", 11)]
)
def test_every_file_may_be_half_written(nursery, whole, tmp_path, method, die_at):
    flags = ["--method", method, *QUICK, "--epochs", "1"]
    assert nursery.taken_up(tmp_path / "runs", flags, [{"die_at": die_at}]) == 1
    check_same(tmp_path / "runs", whole(flags)[0])


@pytest.mark.parametrize(
    "name",
    [
        "fitnet+at+ofd+srrl+kd",  # in a sum the terms do not meet
        pytest.param("crd+reviewkd+semckd+afd", marks=pytest.mark.slow),
        "scheduled+bank+wrapping+toy",
    ],
)
def test_a_loop_taken_up_goes_on_as_if_nothing_had_been(one_thread, name):
    """Teacher in train mode, momenta, learning rates, best weights, what a method learns and keeps: through a
    file and into new objects.
    """
    words = ["ce.weight=1", "kd.weight=1", "semckd.beta=4"]
    if "toy" in name:
        method = toy_methods.define(name, words=words[:1])
    else:
        method = define(name, preset="sakd", words=words[: 3 if "semckd" in name else 2])

    def loop():
        torch.manual_seed(0)
        images, labels = torch.randint(0, 256, (32, 3, 32, 32), dtype=torch.uint8), torch.arange(32) % 10
        batches = Batches(images, labels, (0.5,) * 3, (0.25,) * 3, batch_size=16)
        recipe = get_recipe("sakd", {"epochs": 4, "batch_size": 16, "milestones": (0.4,)})
        student, teacher, fp32 = (
            create_model("resnet8"),
            create_model("resnet8"),
            torch.autocast("cpu", enabled=False),
        )
        distillation = Distillation(
            student, teacher, method, teacher_mode=recipe.teacher_mode, train_labels=labels, batch_size=16
        )
        return Trainer(distillation, batches, batches, recipe, fp32)

    whole = loop()
    for epoch in range(1, 5):
        whole.train_epoch(epoch, Progress("", whole.steps))
    assert all(epoch["loss"] < float("inf") for epoch in whole.history)
    for stop in (1, 2):  # before the learning rate falls, and after
        first, second = loop(), loop()
        for epoch in range(1, stop + 1):
            first.train_epoch(epoch, Progress("", whole.steps))
        file = io.BytesIO()
        torch.save(first.state(), file)
        second.load(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
        assert bits(second.state()) == bits(first.state())
        for epoch in range(stop + 1, 5):
            second.train_epoch(epoch, Progress("", whole.steps))
        assert bits(second.state()) == bits(whole.state())


def test_a_full_disk_is_one_line_and_loses_nothing(nursery, whole, tmp_path):
    reference, _ = whole(SAKD)
    output = tmp_path / "runs"
    status, text = nursery.run(output, SAKD, disk=200_000)  # the configuration fits, a checkpoint does not
    assert (
        status == 2
        and "last.pt cannot be written: File too large" in text.splitlines()[-1]
        and "Traceback" not in text
    )
    status, text = nursery.run(output, SAKD, die_at=22)
    assert status == -signal.SIGKILL
    (folder,) = (path.parent for path in output.glob("fsp-*/config.json"))
    before = {path: path.read_bytes() for path in sorted(output.rglob("*.pt"))}
    status, text = nursery.run(output, [*SAKD, "--resume"], disk=200_000)
    assert status == 2 and "cannot be written: File too large" in text.splitlines()[-1]
    assert (
        before == {path: path.read_bytes() for path in sorted(output.rglob("*.pt"))}
        and (folder / "config.json").exists()
    )
    status, text = nursery.run(output, [*SAKD, "--resume"])
    assert status == 0 and "goes on after epoch" in text and "teacher epoch" not in text
    check_same(output, reference)


@pytest.fixture
def main(monkeypatch, one_thread):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(datasets, "_LOADERS", dict(datasets._LOADERS))
    small_digits()
    import train

    return train.main


AT = ["--method", "at", *QUICK, "--epochs", "2", "--teacher-mode", "train"]


@pytest.fixture
def stopped(nursery, tmp_path_factory):
    """An unfinished run of ``AT`` in a folder of its own, killed after a checkpoint of the student: (output,
    the run's folder).
    """
    output = tmp_path_factory.mktemp("stopped") / "runs"
    assert nursery.run(output, AT, die_at=18)[0] == -signal.SIGKILL
    folder = next(output.glob("at-*"))
    assert (folder / "last.pt").exists()
    return output, folder


def refused(main, capsys, flags, *words):
    capsys.readouterr()
    assert main(flags) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and err.startswith("train.py: error: ")
    for word in words:
        assert word in err, err


def test_what_cannot_be_taken_up_is_one_line_and_stays_as_it_is(main, capsys, stopped, tmp_path):
    output, folder = stopped
    at = ["--output", str(output), *AT, "--resume"]
    refused(
        main, capsys, ["--output", str(tmp_path), *AT, "--resume"], "no unfinished run of this configuration"
    )
    refused(main, capsys, [*at, "--lr", "0.2"], "no unfinished run of this configuration")
    refused(
        main,
        capsys,
        [*at[:-1], "--lr", "0.2", "--resume", folder.name],
        "another configuration: lr 0.05 instead of 0.2",
    )
    refused(main, capsys, [*at, "nowhere"], "--resume nowhere: no such folder")
    refused(main, capsys, [*at, str(output / "teachers")], "holds no run of this version")
    with owned(folder / ".lock") as mine:
        assert mine
        refused(main, capsys, at, "in use by another process")

    checkpoint = folder / "last.pt"
    content = checkpoint.read_bytes()
    state = load(checkpoint)
    damages = {
        "last.pt: not a checkpoint of plain tensors, or truncated": content[: len(content) // 2],
        "last.pt: not the checkpoint of this run": {**state, "config": {**state["config"], "identity": {}}},
        "last.pt: the run had another teacher": {**state, "taught_by": "00"},
        "last.pt: damaged, or of another version (KeyError: 'teacher')": {
            k: v for k, v in state.items() if k != "teacher"
        },
        "last.pt: damaged, or of another version (ValueError": {**state, "epoch": 2},
    }
    for words, damage in damages.items():
        checkpoint.write_bytes(damage) if isinstance(damage, bytes) else torch.save(damage, checkpoint)
        files = {path: path.read_bytes() for path in folder.glob("[!.]*") if path.name != "log.txt"}
        refused(main, capsys, at, words)
        assert len(files) >= 2 and files == {path: path.read_bytes() for path in files}
    checkpoint.write_bytes(content)

    shutil.copytree(folder, output / "copy")
    refused(main, capsys, at, "2 unfinished runs", folder.name, "copy", "--resume FOLDER")
    assert main([*at, folder.name]) == 0
    refused(main, capsys, [*at, folder.name], "that run is finished")
    assert main(at) == 0  # the copy is the only one left
    refused(main, capsys, at, "no unfinished run of this configuration")
    rows = rows_of(output)
    assert [row["folder"] for row in rows[1:]] == [folder.name, "copy"] and rows[1]["acc"] == rows[2]["acc"]
