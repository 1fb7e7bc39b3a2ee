"""What a run says of a fault: the cause that can be mended, what is known, and one of something in the
singular.
"""

from __future__ import annotations

import pytest
import torch
from loops import loop_of

from fastkd.io import console
from fastkd.report import command as report
from fastkd.training import Settings, UserError, device
from fastkd.training.config import Config
from fastkd.training.progress import Progress
from fastkd.training.run_summary import describe
from fastkd.training.teacher import find_teacher

QUICK = "--dataset digits --student resnet8 --batch-size 32 --device cpu --no-pictures".split()


def settings_of(output, method="kd", **changes):
    overrides = {"epochs": 1, "batch_size": 32, **changes.pop("overrides", {})}
    return Settings(
        method,
        "digits",
        teacher="resnet8",
        student="resnet8",
        device="cpu",
        output=output,
        overrides=overrides,
        **changes,
    )


@pytest.mark.parametrize(
    ("precision", "wanted"),
    [("fp32", "try a smaller --lr\n"), ("bf16", "try a smaller --lr or --precision fp32\n")],
)
def test_a_loss_that_is_not_finite_blames_what_can_be_changed(
    small_main, capsys, tmp_path, precision, wanted
):
    flags = [
        "--method",
        "baseline",
        *QUICK,
        "--epochs",
        "1",
        "--lr",
        "1e30",
        "--precision",
        precision,
        "--output",
        str(tmp_path),
    ]
    assert small_main(flags) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.endswith(f"in epoch 1, step 2: {wanted}")


def test_one_of_something_is_singular(small_main, capsys, tmp_path):
    assert [console.counted(n, "epoch") for n in (0, 1, 2)] == ["0 epochs", "1 epoch", "2 epochs"]
    described = describe(Config(settings_of(tmp_path, "baseline")))
    assert "baseline: 1 epoch of ce\n" in described and ", 1 thread," in described  # these tests run on one
    assert "2 epochs of ce\n" in describe(Config(settings_of(tmp_path, "baseline", overrides={"epochs": 2})))
    assert device.device_name(torch.device("cpu")) == "cpu, 1 thread"


def test_a_teacher_at_chance_gets_one_warning(small_main, tmp_path, capsys):
    """One that knows nothing, and one that knows the answers."""
    model = Config(settings_of(tmp_path)).new_model("teacher")
    with torch.no_grad():
        model.fc.weight.zero_()
        model.fc.bias.copy_(torch.eye(10)[0])
    torch.save(model.state_dict(), tmp_path / "t.pt")
    plan = Config(settings_of(tmp_path, teacher_checkpoint=tmp_path / "t.pt"))
    find_teacher(plan)
    warning = "teacher: warning: that is chance for 10 classes: there is nothing to learn from it\n"
    out = capsys.readouterr().out
    assert out.count("warning") == 1 and out.endswith(warning)
    plan.data.test_labels.zero_()
    try:
        assert find_teacher(plan)[1] == 100
    finally:
        plan.data.test_labels.copy_(Config(settings_of(tmp_path)).data.test_labels)
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "cache"),
    [
        (
            type("BackendCompilerFailed", (RuntimeError,), {"__module__": "torch._dynamo.exc"})(
                "backend raised"
            ),
            True,
        ),
        (ImportError("/somewhere/cache/vf/cvf.main.so: file too short"), True),
        (SyntaxError("invalid syntax", ("/somewhere/cache/bh/cbh.py", 1, 1, "x")), True),
        (AttributeError("module 'torch._inductor.runtime.compile_tasks.cbh' has no attribute 'call'"), True),
        (
            type("InvalidCxxCompiler", (RuntimeError,), {"__module__": "torch._inductor.exc"})("no compiler"),
            False,
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_damaged_compiler_cache_is_named_with_the_way_to_clear_it(monkeypatch, error, cache):
    """What torch 2.14 raises, in the forward and the backward pass, for files that were cut off; and no
    compiler at all.
    """
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/somewhere/cache")
    loop = loop_of("baseline", compiled=True)

    def broken(*arguments):
        if type(error).__name__ == "BackendCompilerFailed":
            error.inner_exception = ImportError("/somewhere/cache/nn/cnn.main.so: file too short")
        raise error

    monkeypatch.setattr(loop.train_step, "forward", broken)
    with pytest.raises(
        UserError, match="the step cannot be compiled .*: --no-compile does without"
    ) as caught:
        loop.train_epoch(1, Progress("", loop.steps))
    assert str(caught.value).endswith(
        "; a damaged cache is cleared by deleting /somewhere/cache"
    ) == cache and "\n" not in str(caught.value)


def test_an_error_of_another_kind_is_not_the_compilers(monkeypatch):
    loop = loop_of("baseline", compiled=True)
    monkeypatch.setattr(loop.train_step, "forward", lambda *arguments: {}["key"])
    with pytest.raises(KeyError, match="'key'"):
        loop.train_epoch(1, Progress("", loop.steps))


@pytest.fixture
def table(tmp_path):
    lines = [
        "no,method,dataset,student,teacher,start_time,acc,epoch,nepoch,lr,batch_size",
        "1,at,digits,resnet8,resnet8,x,90,1,1,0.1,32",
    ]
    (tmp_path / "results.csv").write_text("\n".join([*lines, "2,kd,cifar10,resnet8,,x,90,1,1,0.1,32"]) + "\n")
    return tmp_path


@pytest.mark.parametrize(
    ("only", "words"),
    [
        (
            ["metod=at"],
            "--only metod: no such column; known: no, method, dataset, student, teacher, start_time, acc, ",
        ),
        (["method"], "--only method=: no run has that; known: at, kd"),
        (["method=fsp"], "--only method=fsp: no run has that; known: at, kd"),
        (["teacher=resnet20"], "--only teacher=resnet20: no run has that; known: resnet8, nothing"),
        (["method=at", "dataset=cifar10"], "--only: no run has method=at and dataset=cifar10 together"),
    ],
)
def test_only_lists_what_is_known(table, capsys, only, words):
    assert report.main([str(table), *(word for part in only for word in ("--only", part))]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith(f"python -m fastkd.report: error: {words}")


def test_only_takes_runs_that_there_are(table, capsys):
    assert report.main([str(table), "--only", "method=at", "--only", "dataset=digits"]) == 0
    assert report.main([str(table), "--only", "teacher="]) == 0  # those without one
    assert capsys.readouterr().err == ""
