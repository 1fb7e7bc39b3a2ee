"""What a run leaves beside its weights: log, curves, command, means over seeds; and that none of them can
lose its row.
"""

from __future__ import annotations

import csv
import dataclasses
import errno
import json
import resource
import shlex
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from support_data import QUICK

from fastkd.io import console
from fastkd.io.console import logged, say
from fastkd.models import create_model
from fastkd.training import Recipe, Trainer, UserError, command, repeat, results, tensorboard
from fastkd.training.config import Config, Settings
from fastkd.training.groups import described, groups, mean_and_spread
from fastkd.training.tensorboard import Curves

TWO_PHASES = ["--method", "fsp", "--recipe", "sakd", *QUICK, "--epochs", "3", "--init-epochs", "2"]


def rows_of(output):
    with open(output / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def epochs_of(path):
    with open(path, newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def points(folder):
    """{tag: [(step, value), ...]} of all event files in the order of the files."""
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    found: dict[str, list] = {}
    for path in sorted(folder.glob(tensorboard.EVENTS)):
        for event in loader.EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.tensor.float_val[0]))
    return found


def interrupt(monkeypatch, after):
    """Ctrl-C at the beginning of the so-manieth epoch of this process; returns what puts an end to that."""
    whole, left = Trainer.train_epoch, after

    def train_epoch(self, epoch, progress):
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        whole(self, epoch, progress)

    monkeypatch.setattr(Trainer, "train_epoch", train_epoch)
    return lambda: monkeypatch.setattr(Trainer, "train_epoch", whole)


def test_screen_and_log_say_what_happens(small_main, tmp_path, capsys):
    assert small_main(["--method", "at+kd", *QUICK, "--epochs", "2", "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    row = rows_of(tmp_path)[1]
    folder = tmp_path / row["folder"]
    start, end = out.split("at+kd: begins in")
    for words in (
        "at+kd: 2 epochs of ce + at + kd",
        "78,042 parameters",
        "digits (as asked), 64 training",
        "fp32, seed 0",
        "first epoch",
    ):
        assert words in start
    assert "losses   ce by plain PyTorch, at by " in start and "kd by plain PyTorch" in start
    assert "left" in end and f"row 2 of {tmp_path / 'results.csv'}" in end
    heads, values = (line.split("  ") for line in end.splitlines()[-4:-2])
    assert [word.strip() for word in heads if word] == list(results.COLUMNS[:11])
    assert [word.strip() for word in values if word] == [row[name] for name in results.COLUMNS[:11]]
    files, again = end.splitlines()[-2:]
    assert set(files.removeprefix("files").replace(",", " ").split()) == {
        path.name for path in folder.glob("[!.]*")
    }
    assert again.split(None, 1)[1] == json.loads((folder / "config.json").read_text())["command"]
    # the log is the screen, begun by the command; the teacher's has its own part
    log = (folder / "log.txt").read_text().splitlines()
    assert log[0].startswith("# 20") and "\n".join(log[1:]) + "\n" == out
    teacher = (tmp_path / rows_of(tmp_path)[0]["folder"] / "log.txt").read_text().splitlines()[1:]
    assert teacher[0].startswith("teacher: begins in") and set(teacher) < set(log) and len(teacher) == 5


def test_a_log_is_continued_and_keeps_what_a_run_ended_with(small_main, monkeypatch, tmp_path, capsys):
    flags = ["--method", "baseline", *QUICK, "--epochs", "3", "--output", str(tmp_path)]
    mended = interrupt(monkeypatch, 3)
    assert small_main(flags) == 130
    mended()
    assert small_main([*flags, "--resume"]) == 0
    text = next(tmp_path.glob("baseline-*/log.txt")).read_text()
    lines = [line for line in text.splitlines() if line.startswith("baseline epoch ")]
    assert [line.split("epoch ")[1].split("/")[0] for line in lines] == ["1", "2", "3"]
    assert (
        text.count("# 20") == 3
        and "ended: baseline stopped in epoch 3 of 3" in text
        and "goes on after epoch 2" in text
    )


def test_a_run_that_ends_before_its_first_checkpoint_leaves_no_folder(small_main, tmp_path, capsys):
    for method in ("baseline", "kd"):
        assert (
            small_main(
                ["--method", method, *QUICK, "--epochs", "1", "--output", str(tmp_path), "--lr", "1e30"]
            )
            == 2
        )
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_log_that_cannot_be_written_is_told_once_and_left(tmp_path, capsys):
    (tmp_path / "log.txt").mkdir()
    with logged(tmp_path):
        say("one")
        say("two")
    lines = capsys.readouterr().out.splitlines()
    assert (
        len(lines) == 3
        and "log.txt cannot be written: Is a directory" in lines[0]
        and lines[1:] == ["one", "two"]
    )
    assert console._logs == []


@pytest.mark.parametrize(
    "flags",
    [
        ["--method", "baseline", *QUICK],
        [
            "--method",
            "at",
            *QUICK,
            "--milestones",
            "0.25,0.5",
            "--no-nesterov",
            "--drop-last-test",
            "--lr",
            "0.02",
            "--epochs",
            "2",
        ],
        [
            "--method",
            "kd",
            *QUICK,
            "--recipe",
            "kdzoo",
            "--milestones",
            "",
            "--seed",
            "3",
            "--teacher-seed",
            "1",
            "--deterministic",
        ],
        [
            "--method",
            "fsp",
            *QUICK,
            "--precision",
            "bf16",
            "--teacher-checkpoint",
            "a file's name.pt",
            "--pad-mode",
            "reflect",
        ],
    ],
    ids=lambda flags: flags[1],
)
def test_the_command_says_all_that_was_asked_for(small_main, monkeypatch, tmp_path, flags):
    """What a shell makes of it gives the same plan."""
    import train

    monkeypatch.chdir(tmp_path)
    torch.save(create_model("resnet8").state_dict(), "a file's name.pt")

    def plan_of(arguments):
        given = vars(train.build_parser().parse_args(arguments))
        fields = {field.name: given.pop(field.name) for field in dataclasses.fields(Recipe)}
        assert given.pop("repeats") == 1
        return Config(
            Settings(**given, overrides={name: value for name, value in fields.items() if value is not None})
        )

    plan = plan_of([*flags, "--output", str(tmp_path / "a folder; and $more"), "--data", "it's here"])
    words = subprocess.run(
        ["sh", "-c", f'python() {{ printf "%s\\0" "$@"; }}\n{command.command(plan)}'],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")[:-1]
    assert words[0].endswith("train.py")
    again = plan_of(words[1:])
    for role in ("student", "teacher")[: 1 + plan.method.needs_teacher]:
        assert again.identity(role) == plan.identity(role)
    for name in ("output", "data", "pictures", "precision", "deterministic", "overrides"):
        assert getattr(again.settings, name) == getattr(plan.settings, name)


def test_the_command_repeats_the_run(small_main, tmp_path):
    output = tmp_path / "one run's"
    assert (
        small_main(
            [
                "--method",
                "kd",
                *QUICK,
                "--epochs",
                "2",
                "--output",
                str(output),
                "--lr",
                "0.02",
                "--seed",
                "5",
            ]
        )
        == 0
    )
    row = rows_of(output)[1]
    script = (output / row["folder"] / "command.sh").read_text()
    assert f"cd {shlex.quote(str(Path.cwd()))} || exit\n" in script
    words = shlex.split(script.splitlines()[-1])
    assert words.pop() == "$@"  # for --resume
    assert small_main(words[words.index("train.py") + 1 :]) == 0
    again = rows_of(output)[2]
    weights = [
        torch.load(output / name / "best.pt", weights_only=True)["model"]
        for name in (row["folder"], again["folder"])
    ]
    assert row["folder"] != again["folder"] and all(
        torch.equal(weights[0][name], weights[1][name]) for name in weights[0]
    )


def test_curves_are_the_history_and_a_resumed_run_has_no_step_twice(small_main, monkeypatch, tmp_path):
    """Stopped in each phase, and taken up by an object that knows of no phase before."""
    flags = [*TWO_PHASES, "--output", str(tmp_path)]
    # in the second epoch of the first phase, at the second's beginning, in its second epoch
    for after in (3 + 2, 2 + 1, 2):
        mended = interrupt(monkeypatch, after)
        assert small_main([*flags, *["--resume"] * (after != 5)]) == 130
        mended()
    assert small_main([*flags, "--resume"]) == 0
    folder = next(tmp_path.glob("fsp-*"))
    found = points(folder)
    assert len(list(folder.glob(tensorboard.EVENTS))) == 1
    expected = {}
    for prefix, name in (("", "epochs.csv"), ("init/", "init.csv")):
        for epoch in epochs_of(folder / name):
            for tag, key in {
                "loss/total": "loss",
                "lr": "lr",
                "accuracy/train": "train_acc",
                "images_per_second": "images_per_second",
            }.items():
                expected.setdefault(prefix + tag, []).append(
                    (int(epoch["epoch"]), pytest.approx(epoch[key], rel=1e-6))
                )
            for term in ("ce", "fsp"):
                if term in epoch:
                    expected.setdefault(f"{prefix}loss/{term}", []).append(
                        (int(epoch["epoch"]), pytest.approx(epoch[term], rel=1e-6))
                    )
            if "test_acc" in epoch:
                expected.setdefault("accuracy/test", []).append(
                    (int(epoch["epoch"]), pytest.approx(epoch["test_acc"], rel=1e-6))
                )
    assert [step for step, _ in found["lr"]] == [1, 2, 3] and [
        step for step, _ in found["init/loss/fsp"]
    ] == [1, 2]
    assert found == expected


def test_without_tensorboard_the_screen_says_so_and_the_run_is_whole(
    small_main, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(tensorboard, "available", lambda: False)
    assert small_main(["--method", "baseline", *QUICK, "--epochs", "1", "--output", str(tmp_path)]) == 0
    assert "no TensorBoard curves (the package tensorboard is not installed)" in capsys.readouterr().out
    assert len(rows_of(tmp_path)) == 1 and not list(tmp_path.rglob(tensorboard.EVENTS))


def test_curves_that_fail_lose_no_row(small_main, monkeypatch, tmp_path, capsys):
    writer = pytest.importorskip("torch.utils.tensorboard")

    def full(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer.SummaryWriter, "flush", full)
    assert small_main(["--method", "baseline", *QUICK, "--epochs", "2", "--output", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert out.count("No space left on device") == 1 and "the run goes on" in out and err == ""
    assert rows_of(tmp_path)[0]["nepoch"] == "2"


def test_curves_on_a_full_disk_are_one_line(tmp_path, capfd, monkeypatch):
    pytest.importorskip("tensorboard")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    made, history, tracebacks = Curves(tmp_path), [], []
    monkeypatch.setattr(threading, "excepthook", tracebacks.append)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        for epoch in range(1, 30):
            history.append(
                {"epoch": epoch, "lr": 0.1, "loss": 1.0, "ce": 1.0, "train_acc": 50.0, "test_acc": 50.0}
            )
            made.add("main", history)
        made.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    out, err = capfd.readouterr()
    assert len(out.splitlines()) == 1 and "File too large" in out and err == ""
    assert not tracebacks and threading.excepthook == tracebacks.append


def test_mean_and_sample_deviation():
    assert [mean_and_spread([]), mean_and_spread([91.8]), mean_and_spread([91.80, 92.16, 91.79])] == [
        "–",
        "91.80",
        "91.92 ± 0.21",
    ]


def test_a_group_is_what_differs_in_the_seed_alone_and_a_seed_counts_once():
    common = {
        "method": "at",
        "dataset": "cifar10",
        "student": "resnet20",
        "teacher": "resnet20",
        "recipe": "hankyul2",
        "nepoch": "200",
    }
    rows = [{**common, "seed": seed, "acc": acc} for seed, acc in (("0", "90"), ("1", "91"), ("0", "92"))]
    rows += [
        {**common, name: "other", "seed": "2", "acc": "0"}
        for name in ("overrides", "precision", "teacher_checkpoint", "teacher")
    ]
    found = groups(rows)
    assert [group.seeds for group in found] == [["0", "1"], ["2"], ["2"], ["2"], ["2"]] and found[0].values(
        "acc"
    ) == [92, 91]


def test_a_title_says_what_a_run_was():
    row = {
        "method": "at+kd",
        "dataset": "cifar10",
        "student": "resnet20",
        "teacher": "resnet110",
        "nepoch": 10,
    }
    assert described(row) == "AT+KD on CIFAR-10, resnet20 ← resnet110, 10 epochs"
    alone = {"method": "other", "dataset": "svhn", "student": "resnet8", "teacher": "", "nepoch": "1"}
    assert described(alone) == "other on svhn, resnet8, 1 epoch"


def test_repeats_are_rows_with_a_mean_and_one_teacher(small_main, tmp_path, capsys):
    flags = [
        "--method",
        "kd",
        *QUICK,
        "--epochs",
        "1",
        "--output",
        str(tmp_path),
        "--seed",
        "4",
        "--repeats",
        "3",
    ]
    assert small_main(flags) == 0
    rows = rows_of(tmp_path)
    assert [(row["method"], row["seed"], row["teacher_seed"]) for row in rows] == [
        ("teacher", "4", ""),
        ("kd", "4", "4"),
        ("kd", "5", "4"),
        ("kd", "6", "4"),
    ]
    assert len(list(tmp_path.glob("teachers/*.pt"))) == 1
    mean = mean_and_spread([float(row["acc"]) for row in rows[1:]])
    assert (
        "±" in mean
        and f"3 runs, seeds 4 5 6: acc {mean} %, reported_acc {mean} %"
        in capsys.readouterr().out.splitlines()[-1]
    )
    section = (tmp_path / "results.md").read_text().split("## Means over seeds")[1]
    assert "| 4 5 6 |" in section and mean in section
    # one of them alone, by its command, is the same run
    again = json.loads((tmp_path / rows[2]["folder"] / "config.json").read_text())["command"]
    words = shlex.split(again)
    assert small_main(words[words.index("train.py") + 1 :]) == 0
    rows = rows_of(tmp_path)
    assert rows[4]["acc"] == rows[2]["acc"] and rows[4]["losses"] == rows[2]["losses"]
    assert "| 4 5 6 |" in (tmp_path / "results.md").read_text()  # the same seed again is no fourth sample


def test_repeats_that_were_stopped_go_on(small_main, monkeypatch, tmp_path, capsys):
    flags = ["--method", "kd", *QUICK, "--epochs", "2", "--output", str(tmp_path), "--repeats", "3"]
    mended = interrupt(monkeypatch, 2 + 2 + 2)  # in the second student
    assert small_main(flags) == 130
    mended()
    assert [row["method"] for row in rows_of(tmp_path)] == ["teacher", "kd"]
    capsys.readouterr()
    assert small_main([*flags, "--resume"]) == 0
    out = capsys.readouterr().out
    assert (
        "seed 0, run 1 of 3: finished, row 2" in out
        and "goes on after epoch 1 of 2" in out
        and "3 runs, seeds 0 1 2" in out
    )
    assert [(row["method"], row["seed"]) for row in rows_of(tmp_path)] == [
        ("teacher", "0"),
        ("kd", "0"),
        ("kd", "1"),
        ("kd", "2"),
    ]
    assert small_main([*flags, "--resume"]) == 0  # all are there: only the means
    assert len(rows_of(tmp_path)) == 4 and "3 runs, seeds 0 1 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("times", "resume", "words"),
    [
        (0, None, "--repeats is 0"),
        (2, "folder", "leave the folder out"),
        (2, "", "without --resume it begins"),
    ],
)
def test_repeats_that_cannot_be(small_main, tmp_path, times, resume, words):
    with pytest.raises(UserError, match=words):
        repeat(
            Settings("kd", "digits", teacher="resnet8", student="resnet8", output=tmp_path, resume=resume),
            times,
        )


def test_a_shared_teacher_makes_another_run_of_a_seed(small_main, tmp_path):
    common = {"dataset": "digits", "student": "resnet8", "output": tmp_path, "seed": 1}
    plans = [Config(Settings("kd", teacher="resnet8", teacher_seed=seed, **common)) for seed in (None, 1, 0)]
    own, same, shared = (plan.identity("student") for plan in plans)
    assert own == same != shared and plans[0].teacher_path() != plans[2].teacher_path()
    assert plans[2].identity("teacher")["seed"] == 0 and shared["seed"] == 1
    first, other = (next(plan.batches("teacher")[0].train(1))[1] for plan in (plans[0], plans[2]))
    assert not torch.equal(first, other)
    alone = [Config(Settings("baseline", teacher_seed=seed, **common)) for seed in (None, 0)]
    assert alone[0].identity("student") == alone[1].identity("student")


def history(epochs, **terms):
    return [
        {"epoch": i, "lr": 0.1, "loss": 1.0, **terms, "train_acc": 50.0, "test_acc": 50.0 + i}
        for i in range(1, epochs + 1)
    ]


def writers():
    return [thread for thread in threading.enumerate() if type(thread).__module__.startswith("tensorboard.")]


def test_a_csv_of_the_users_own_is_not_read_and_curves_go_on(small_main, monkeypatch, tmp_path, capsys):
    pytest.importorskip("tensorboard")
    flags = [*TWO_PHASES, "--output", str(tmp_path)]
    mended = interrupt(monkeypatch, 3 + 2 + 2)
    assert small_main(flags) == 130
    mended()
    folder = next(tmp_path.glob("fsp-*"))
    (folder / "notes.csv").write_text("day,remark\nMonday,it rains\n")
    assert small_main([*flags, "--resume"]) == 0
    assert "curves" not in capsys.readouterr().out.split("goes on after")[1]
    found = points(folder)
    assert [step for step, _ in found["lr"]] == [1, 2, 3] and [
        step for step, _ in found["init/loss/fsp"]
    ] == [1, 2]
    assert not [tag for tag in found if "notes" in tag]


@pytest.mark.parametrize("what", ["flush", "__init__", "add_scalar", "init.csv"])
def test_curves_are_deleted_only_once_others_are_written_and_leave_no_thread(
    monkeypatch, tmp_path, capsys, what
):
    writer = pytest.importorskip("torch.utils.tensorboard")
    before = writers()
    first = Curves(tmp_path)
    first.add("main", history(2))
    first.close()
    (old,) = tmp_path.glob(tensorboard.EVENTS)
    content = old.read_bytes()

    def full(self, *arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    second = Curves(tmp_path)
    second.earlier = ["init"] if what == "init.csv" else []
    with monkeypatch.context() as patch:
        if what == "__init__":  # when the thread is there already
            patch.setattr("tensorboard.summary.writer.event_file_writer._AsyncWriter.flush", full)
        elif what != "init.csv":
            patch.setattr(writer.SummaryWriter, what, full)
        second.add("main", history(3))
        second.add("main", history(4))
        second.close()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "end here" in lines[0] and "the run goes on" in lines[0]
    assert old.read_bytes() == content and writers() == before
    third = Curves(tmp_path)
    third.add("main", history(4))
    third.close()
    assert (
        not old.exists()
        and points(tmp_path)["accuracy/test"] == [(i, 50.0 + i) for i in range(1, 5)]
        and writers() == before
    )
