"""fastkd.models.load_student: from a run's folder alone to the network that the run tested."""

from __future__ import annotations

import pytest
import torch
from record_files import rows_of

import fastkd
from fastkd import plugins
from fastkd.errors import UserError
from fastkd.evaluate import test as evaluated
from fastkd.models import WeightsError, create_model, load_student
from fastkd.training import Settings
from fastkd.training.config import Config
from fastkd.training.evaluation import evaluate


@pytest.mark.parametrize(
    ("method", "options"),
    [("simkd", ["factor=4"]), ("norm+kd", ["norm.gamma=0.5", "copies=2"]), ("baseline", [])],
)
def test_the_network_of_a_run_answers_as_in_the_run(small_main, monkeypatch, tmp_path, method, options):
    flags = [
        "--method",
        method,
        "--dataset",
        "digits",
        "--teacher",
        "wrn_16_1",
        "--student",
        "resnet8",
        "--epochs",
        "1",
        "--device",
        "cpu",
        "--no-pictures",
        "--output",
        str(tmp_path),
        *(f"--option={word}" for word in options),
    ]
    assert small_main(flags) == 0
    rows = rows_of(tmp_path)
    if method != "baseline":
        (tmp_path / "teachers").rename(tmp_path / "elsewhere")  # nothing but the file is read
    for row in rows:
        folder, state = tmp_path / row["folder"], torch.get_rng_state()
        network = load_student(folder)
        assert not network.training and torch.equal(state, torch.get_rng_state())
        saved = torch.load(folder / "best.pt", weights_only=True)
        torch.testing.assert_close(dict(network.state_dict()), dict(saved["model"]), rtol=0, atol=0)
        plan = Config(
            Settings(
                "baseline",
                "digits",
                student="resnet8",
                device="cpu",
                output=tmp_path,
                overrides={"batch_size": 32},
            )
        )
        assert evaluate(network, plan.batches("student")[1], plan.autocast()) == saved["acc"]
        assert load_student(str(folder), file="last.pt")(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert (
        type(network.neck).__name__
        == {"simkd": "Projector", "norm+kd": "Pair", "baseline": "Identity"}[method]
    )
    # and it may teach
    taught = fastkd.Distillation(create_model("resnet8"), network, "kd")(torch.randn(2, 3, 32, 32))
    assert taught.teacher_logits.shape == (2, 10) and taught.total.isfinite()


def test_what_is_no_run_is_one_line(tmp_path):
    with pytest.raises(WeightsError, match=r"best\.pt: No such file"):
        load_student(tmp_path)
    torch.save({"model": create_model("resnet8").state_dict()}, tmp_path / "best.pt")
    with pytest.raises(
        WeightsError, match=r"best\.pt: not the weights of a run of this version \(KeyError: 'config'\)"
    ) as caught:
        load_student(tmp_path)
    assert "\n" not in str(caught.value)
    about = {"identity": {"model": "resnet7"}, "trained": "kd"}
    torch.save({"model": create_model("resnet8").state_dict(), "config": about}, tmp_path / "best.pt")
    with pytest.raises(WeightsError, match=r"ValueError: model 'resnet7' is not known"):
        load_student(tmp_path)


ABOUT = {"identity": {"model": "resnet8"}, "trained": "baseline", "classes": 10}


@pytest.mark.parametrize(
    "about",
    [
        "resnet8",
        None,
        [1],
        {**ABOUT, "identity": None},
        {**ABOUT, "identity": "resnet8"},
        {**ABOUT, "identity": {"model": "small", "plugins": [1]}},
    ],
    ids=str,
)
def test_what_another_program_has_written_under_config_is_one_line(tmp_path, about):
    torch.save({"model": create_model("resnet8").state_dict(), "config": about}, tmp_path / "best.pt")
    with pytest.raises(WeightsError, match=r"best\.pt: not the weights of a run of this version") as caught:
        load_student(tmp_path)
    assert "\n" not in str(caught.value)
    pytest.importorskip("sklearn")  # which brings the digits
    with pytest.raises(UserError, match=r"is of no run|not the weights of a run") as caught:
        evaluated(tmp_path, dataset="digits")
    assert "\n" not in str(caught.value)


def test_a_network_of_a_file_is_built_by_what_lies_there_now(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    about = {
        **ABOUT,
        "identity": {"model": "nets.py:small", "plugins": {"model nets.py:small": "nets.py 0123"}},
    }
    torch.save({"model": create_model("resnet8").state_dict(), "config": about}, tmp_path / "best.pt")
    with pytest.raises(WeightsError, match=r"nets\.py cannot be imported: no such file") as caught:
        load_student(tmp_path)
    assert "\n" not in str(caught.value)
    factory = "def small(num_classes):\n    return fastkd.models.create_model('{}', num_classes)\n"
    for name in ("resnet20", "resnet8"):
        plugins.of_file.cache_clear()
        (tmp_path / "nets.py").write_text("import fastkd\n" + factory.format(name))
        if name == "resnet20":
            with pytest.raises(WeightsError, match=r"another layout than the model's: it lacks") as caught:
                load_student(tmp_path)
            assert "\n" not in str(caught.value)
    assert load_student(tmp_path)(torch.randn(2, 3, 32, 32)).shape == (2, 10)
