"""Several students side by side: the same bits, files and rows as alone, also after a stop on either way."""

from __future__ import annotations

import json

import pytest
import torch
from record_files import rows_of
from run_cases import error_of
from runs import bits, load

from fastkd.data.loader import Batches
from fastkd.distillation import Distillation
from fastkd.errors import UserError
from fastkd.methods import union
from fastkd.models import create_model
from fastkd.training import Trainer
from fastkd.training.passes import answer_key
from fastkd.training.step import TrainStep

OTHERS = ("at", "fsp", "rkd", "srrl", "afd", "reviewkd", "norm", "sakd", "dkd")
COMMON = (
    "--dataset digits --teacher resnet8 --student resnet8 --device cpu --no-pictures --batch-size 24"
    " --epochs 2 --no-drop-last"
).split()
DRAWN = {}  # what the `alone` ones drew in their last steps
CLOCKED = ("no", "start_time", "seconds", "images_per_second", "folder")
METHODS = {
    "baseline": [],
    "kd": [],
    "fitnet": ["--option", "fitnet.phases=2", "--init-epochs", "1"],  # a first phase
    "crd": [],  # banks
    "simkd": [],  # another network
    "semckd": [],  # connectors, and an epoch without its last, smaller batch
    "ofd": [],  # a teacher in train mode
}


def command(output, *methods):
    options = [word for method in methods for word in METHODS[method]]
    return ["--method", ",".join(methods), *COMMON, *options, "--output", str(output)]


def found(output):
    """By method: the row without what a clock said, the files' bits, and the lines of the log's epochs."""
    runs = {}
    for row in rows_of(output):
        folder = output / row["folder"]
        identity = json.loads((folder / "config.json").read_text())["identity"]
        lines = [line.split("  ") for line in (folder / "log.txt").read_text().splitlines()]
        epochs = [line[:2] for line in lines if len(line) > 2 and " epoch " in line[0]]
        if row["method"] != "teacher":  # which is trained within the first student's run
            epochs = [line for line in epochs if not line[0].startswith("teacher ")]
        files = {name: bits(load(folder / name)) for name in ("last.pt", "best.pt")}
        plain = {key: value for key, value in row.items() if key not in CLOCKED}
        runs[row["method"]] = plain, identity, epochs, files
    return runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("alone")


@pytest.fixture
def numbers(monkeypatch):
    """A random number that each student draws in each of its steps, as a method might, by the method."""
    drawn, run = {}, TrainStep._run

    def drawing(self, *arguments):
        drawn.setdefault(self.distillation.definition.name, []).append(torch.rand(()).item())
        run(self, *arguments)

    monkeypatch.setattr(TrainStep, "_run", drawing)
    return drawn


@pytest.fixture
def alone(small_main, folder, numbers):
    """What a run of its own leaves of each method, by its name; they are trained once for all tests."""
    if not (folder / "results.csv").exists():
        for method in METHODS:
            assert small_main(command(folder, method)) == 0
            DRAWN[method] = numbers[method][-5:]
    numbers.clear()
    return found(folder)


def stop(monkeypatch, step, epoch=2):
    """Ctrl-C before this step of all steps of this epoch; returns what puts an end to that."""
    whole, seen = Trainer._set_rate, [0]

    def rate(self, number):
        if len(self.history) == epoch - 1 and self.test_batches is not None and self.teacher is not None:
            seen[0] += 1
            if seen[0] == step:
                raise KeyboardInterrupt
        whole(self, number)

    monkeypatch.setattr(Trainer, "_set_rate", rate)
    return lambda: monkeypatch.setattr(Trainer, "_set_rate", whole)


@pytest.fixture
def passes(monkeypatch):
    """The batches that teachers were shown, in order."""
    shown, ask = [], Distillation.ask

    def counted(self, images):
        if self.teacher is not None and images.any():  # else a look at blank images
            shown.append((self.teacher_mode, len(images)))
        return ask(self, images)

    monkeypatch.setattr(Distillation, "ask", counted)
    return shown


def test_each_has_the_bits_of_its_own_run(small_main, alone, tmp_path, passes, numbers, capsys):
    passes.clear()
    assert small_main(command(tmp_path, *METHODS)) == 0
    out = capsys.readouterr().out
    assert {method: numbers[method][-5:] for method in METHODS} == DRAWN
    shared = found(tmp_path)
    assert {*shared} == {"teacher", *METHODS}
    for method, (row, identity, epochs, files) in alone.items():
        assert shared[method][0] == row and shared[method][1] == identity, method
        assert shared[method][3] == files, method
        assert shared[method][2] == epochs and (epochs or method == "teacher"), method
    # FitNet's first phase, then two epochs for both modes of the teacher: each is 24, 24 and 16 images
    assert [passes.count(("eval", size)) for size in (24, 16)] == [2 + 2 * 2, 1 + 2]
    assert [passes.count(("train", size)) for size in (24, 16)] == [2 * 2, 2]
    assert "7 students side by side: baseline, kd, fitnet" in out
    assert "the teacher answers to each batch once for kd, crd, simkd, semckd; once for ofd" in out
    assert f"7 runs, seed 0; kept in {tmp_path / 'results.md'}" in out.splitlines()[-1]
    assert len(list(tmp_path.glob("teachers/*.pt"))) == 1


def test_what_was_stopped_goes_on_together_or_alone(small_main, alone, tmp_path, monkeypatch, capsys):
    some = ("kd", "crd", "ofd")
    mended = stop(monkeypatch, 5)
    assert small_main(command(tmp_path, *some)) == 130
    mended()
    err = capsys.readouterr().err
    lines = err.removeprefix("train.py: ").splitlines()
    assert sorted(line.split(" stopped in epoch 2 of 2, step ")[0] for line in lines) == sorted(some)
    assert all(line.endswith("no row was added; --resume goes on") for line in lines)
    assert small_main([*command(tmp_path, "crd"), "--resume"]) == 0  # one of them alone
    assert "crd: " in capsys.readouterr().out
    # the others together, with one that begins and one that was stopped alone
    mended = stop(monkeypatch, 1)
    assert small_main(command(tmp_path, "simkd")) == 130
    mended()
    capsys.readouterr()
    again = [*command(tmp_path, "kd", "crd", "simkd", "ofd", "semckd"), "--resume", "auto"]
    assert small_main(again) == 0
    out = capsys.readouterr().out
    assert "4 students side by side: kd, simkd, ofd, semckd" in out and "crd: finished, row 2" in out
    assert out.count("goes on after epoch 1 of 2") == 3 and "semckd: begins in" in out
    for method, run in found(tmp_path).items():
        assert run[0] == alone[method][0] and run[3] == alone[method][3], method
    rows = len(rows_of(tmp_path))
    assert small_main(again) == 0 and len(rows_of(tmp_path)) == rows == 6  # all are there


@pytest.fixture
def made(monkeypatch):
    """What is made once for all: the epochs whose crops and flips are drawn, and the batches that are cut."""
    drawn, cut = [], []
    draw, take = Batches.draw, Batches.take

    def drawing(self, epoch):
        for params in draw(self, epoch):
            drawn.append((self.stream, epoch))
            yield params

    def cutting(self, params):
        cut.append(params.clone())
        return take(self, params)

    monkeypatch.setattr(Batches, "draw", drawing)
    monkeypatch.setattr(Batches, "take", cutting)
    return drawn, cut


def test_the_other_methods_too_by_one_augmentation_for_all(small_main, tmp_path, made):
    """Two steps each, by a teacher of their own."""
    drawn, cut = made
    file = tmp_path / "teacher.pt"
    torch.save(create_model("resnet8", 10).state_dict(), file)
    short = [word for word in COMMON if word not in ("--epochs", "2", "--batch-size", "24")]
    short += ["--batch-size", "32", "--epochs", "1", "--teacher-checkpoint", str(file)]
    for method in OTHERS:
        assert small_main(["--method", method, *short, "--output", str(tmp_path / "alone")]) == 0
    steps = [("student", 1)] * 2
    # as many each in turn, so that one batch for all is what is counted below
    assert drawn == steps * len(OTHERS) and len(cut) == len(drawn)
    assert all(torch.equal(params, cut[i % 2]) for i, params in enumerate(cut))
    two = cut[:2]
    drawn.clear()
    cut.clear()
    assert small_main(["--method", ",".join(OTHERS), *short, "--output", str(tmp_path / "together")]) == 0
    assert drawn == steps and len(cut) == 2 and all(map(torch.equal, cut, two))
    alone, together = found(tmp_path / "alone"), found(tmp_path / "together")
    assert {*alone} == {*OTHERS} == {*together}
    for method, run in alone.items():
        assert together[method] == run, method


def test_teachers_in_train_mode_share_a_pass_and_their_averages(small_main, tmp_path, passes):
    flags = ["--teacher-mode", "train"]
    for method in ("kd", "crd"):
        assert small_main([*command(tmp_path / "alone", method), *flags]) == 0
    passes.clear()
    assert small_main([*command(tmp_path, "kd", "crd"), *flags]) == 0
    assert passes == [("train", size) for size in (24, 24, 16)] * 2
    own, shared = found(tmp_path / "alone"), found(tmp_path)
    assert "teacher" in dict(own["kd"][3]["last.pt"]) and own == shared


def test_an_error_of_one_student_ends_it_alone(small_main, tmp_path, capsys):
    flags = [*command(tmp_path, "kd", "crd"), "--option", "kd.weight=1e38"]
    err = error_of(small_main, capsys, flags, status=1)
    assert "kd: the loss is no longer finite in epoch 1" in err
    assert err.endswith("the other 1 of 2 runs are finished\n")
    assert [row["method"] for row in rows_of(tmp_path)] == ["teacher", "crd"]
    assert not list(tmp_path.glob("kd-*"))  # nothing was saved of it


def test_compiled_steps_share_nothing_and_say_so(small_main, tmp_path, monkeypatch, capsys):
    from fastkd.training import repeats

    trained, failing = [], []

    def run(settings, config):
        trained.append((settings.method, settings.compile))
        if settings.method in failing:
            raise UserError("the loss is no longer finite")
        return {"acc": "1", "reported_acc": "1"}

    monkeypatch.setattr(repeats, "run", run)
    assert small_main([*command(tmp_path, "kd", "crd"), "--compile"]) == 0
    assert trained == [("kd", True), ("crd", True)]
    assert "one student after the other: each step is compiled" in capsys.readouterr().out
    failing.append("kd")  # an error ends one of them alone here too
    told = error_of(small_main, capsys, [*command(tmp_path, "kd", "crd"), "--compile"], status=1)
    assert told.endswith("error: kd: the loss is no longer finite; the other 1 of 2 runs are finished\n")
    assert trained[2:] == trained[:2]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--method", "kd,kd"], "--method kd,kd has kd twice"),
        (["--method", "kd,at", "--resume", "folder"], "leave the folder out"),
        (["--method", "kd,at", "--option", "crd.k=4"], "no method of kd,at takes it"),
        (["--method", "kd,at", "--option", "beta=4"], "no method of kd,at takes it, wanted TERM.FIELD=VALUE"),
        (["--method", "kd,at", "--init-epochs", "1"], "--method kd has no first phase"),
        (["--method", "kd,at", "--option", "at.beta=x"], "option at.beta is 'x', wanted a number"),
    ],
)
def test_what_cannot_be_is_one_line_before_any_training(small_main, tmp_path, capsys, flags, words):
    assert words in error_of(small_main, capsys, [*COMMON, *flags, "--output", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("teacher", ["resnet8", "wrn_16_2"])
def test_a_pass_is_shared_where_each_gets_the_bits_of_its_own(teacher):
    """The stem of a wide ResNet is folded too where nobody asks for its map."""
    torch.manual_seed(0)
    network, images = create_model(teacher, 10), torch.randn(4, 3, 32, 32)
    for norm in network.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    methods = ("kd", "rkd", "at", "ofd")
    made = [Distillation(create_model(teacher, 10), network, method) for method in methods]
    keys, own = [answer_key(each) for each in made], [each.ask(images) for each in made]
    together = [{"kd", "rkd", "at", "ofd"}] if teacher == "resnet8" else [{"kd", "rkd"}, {"at", "ofd"}]
    assert [{m for m, key in zip(methods, keys) if key == one} for one in dict.fromkeys(keys)] == together
    for key in dict.fromkeys(keys):
        group = [i for i, other in enumerate(keys) if other == key]
        asker = made[group[0]]
        asker.points[1] = union(made[i].points[1] for i in group)
        asker.fold()
        answer = asker.ask(images)
        for i in group:
            assert torch.equal(answer.logits, own[i].logits), methods[i]
            assert torch.equal(answer.features.pooled, own[i].features.pooled), methods[i]
