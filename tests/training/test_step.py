"""The step in its forms: a folded teacher, compiled, replayed as a graph. None of them changes what is
learned.
"""

from __future__ import annotations

import copy
import io

import pytest
import torch
from loops import lively, loop_of, trained

from fastkd.distillation import Distillation
from fastkd.methods import METHODS
from fastkd.models import create_model
from fastkd.models.folding import fold_for_inference, foldable
from fastkd.training import Batches, Trainer, UserError, get_recipe
from fastkd.training.config import WORTH_COMPILING, Config, Settings
from fastkd.training.run_summary import describe
from fastkd.training.step import Replayed

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("features", [False, True, "preact", "both", "pooled"])
@pytest.mark.parametrize(
    ("name", "folded"), [("resnet8", 9), ("resnet_32_20", 21), ("wrn_16_2", 6), ("wrn_16_1", 6)]
)
def test_a_folded_teacher_answers_as_before(name, folded, features):
    model, x = lively(name), torch.randn(3, 3, 32, 32)
    before = copy.deepcopy(model.state_dict())
    light = fold_for_inference(model, features)
    # without features, the stem of a wider wide ResNet has no reader but its batch norm either
    assert len(foldable(model, features)) == folded + (name == "wrn_16_2" and features in (False, "pooled"))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    answers = [net.double()(x.double(), features=features) for net in (model, light)]
    # folded weights are rounded to float32, against the size of a map's numbers
    for got, want in zip(*map(torch.utils._pytree.tree_leaves, reversed(answers)), strict=True):
        if want is None:  # a field of Features that was not asked for
            assert got is None
            continue
        torch.testing.assert_close(got, want, rtol=0, atol=2e-6 * max(1.0, want.abs().max().item()))


def test_weights_cast_once_are_those_that_autocast_casts():
    model, x = lively("wrn_16_1"), torch.randn(2, 3, 32, 32).bfloat16()
    norms = [name for name, module in model.named_modules() if isinstance(module, torch.nn.BatchNorm2d)]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        light = fold_for_inference(model, True, torch.bfloat16)
        folded = fold_for_inference(model, True)
        assert torch.equal(light(x), folded(x))
    assert light.conv1.weight.dtype == torch.bfloat16
    assert {
        light.get_submodule(name).weight.dtype
        for name in norms
        if hasattr(light.get_submodule(name), "weight")
    } == {torch.float32}


def test_autocast_is_entered_in_each_step_and_left_before_the_weights_change():
    """It keeps copies of the weights as long as it is on."""
    loop = loop_of("kd", torch.bfloat16, count=24)
    on = {"student": [], "step": []}

    def note(place, while_training=True):
        if while_training:
            on[place].append(torch.is_autocast_enabled("cpu"))

    loop.student.register_forward_pre_hook(lambda network, *_: note("student", network.training))
    loop.optimizer.register_step_pre_hook(lambda *_: note("step"))
    trained(loop, (1,))
    assert on == {"student": [True] * 3, "step": [False] * 3}


def test_what_cannot_be_followed_keeps_its_batch_norms():
    class Moody(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = create_model("resnet8")

        def forward(self, x, features=False):
            return self.net(x if x.sum() > 0 else -x, features=features)

    assert foldable(Moody(), True) == []
    assert (
        len(
            [
                module
                for module in fold_for_inference(Moody(), True).modules()
                if isinstance(module, torch.nn.BatchNorm2d)
            ]
        )
        == 9
    )


def bits(loop):
    state = loop.state()
    pace = ("seconds", "images_per_second")
    return [
        {name: value.numpy().tobytes() for name, value in state["model"].items()},
        [value["momentum_buffer"].numpy().tobytes() for value in state["optimizer"]["state"].values()],
        [{key: value for key, value in epoch.items() if key not in pace} for epoch in state["history"]],
    ]


class Again:
    """What stands in for a CUDA graph without a GPU: the same function on the same tensors, again."""

    def __init__(self, run, drawn):
        self.run, self.drawn, self.replays = run, drawn, 0

    def replay(self):
        self.replays += 1
        self.run(self.drawn)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(Replayed, "warm", lambda self, drawn: self.run(drawn))
    monkeypatch.setattr(Replayed, "capture", lambda self: Again(self.run, self.augment_params))


@pytest.mark.parametrize("method", [*METHODS, "at+kd"])
def test_a_replayed_step_trains_the_same_bits(no_gpu, method):
    """Numbers through one tensor, the rate in another, momenta reset in place, and the last, smaller batch
    without the graph.
    """
    graphed = trained(loop_of(method, captured=True))
    assert graphed.train_step.graph.graph.replays == 16 - Replayed.FIRST  # eight whole batches an epoch
    assert bits(graphed) == bits(trained(loop_of(method)))


def test_a_replayed_run_is_taken_up(no_gpu):
    whole, first, second = (loop_of("at", captured=True) for _ in range(3))
    file = io.BytesIO()
    torch.save(trained(first, [1]).state(), file)
    second.load(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert bits(trained(second, [2])) == bits(trained(whole))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_graph_trains_as_eager_does():  # untested: no GPU was at hand
    found = []
    for captured in (False, True):
        torch.manual_seed(5)
        images, labels = torch.randint(0, 256, (640, 3, 32, 32), dtype=torch.uint8), torch.arange(640) % 10
        batches = Batches(images, labels, (0.5,) * 3, (0.25,) * 3, batch_size=64, device="cuda")
        recipe = get_recipe("repdistiller", {"epochs": 2, "batch_size": 64})
        networks = create_model("resnet8"), lively("resnet8")
        autocast = torch.autocast("cuda", torch.bfloat16, enabled=False)
        made = Distillation(*networks, "at", preset="repdistiller", autocast=autocast)
        found.append(trained(Trainer(made, batches, batches, recipe, autocast, captured=captured)))
    eager, graphed = found
    assert graphed.train_step.graph.graph is not None
    assert graphed.history[-1]["loss"] == pytest.approx(eager.history[-1]["loss"], rel=1e-2)


@pytest.mark.slow
def test_a_compiled_step_trains_alike_and_is_taken_up(capsys):
    eager, whole, first, second = (loop_of("at", compiled=compiled) for compiled in (False, True, True, True))
    trained(eager), trained(whole)
    assert "compiling the step" in capsys.readouterr().out
    assert whole.history[0]["loss"] == pytest.approx(eager.history[0]["loss"], rel=1e-3)
    weights = [torch.cat([value.flatten() for value in loop.student.parameters()]) for loop in (eager, whole)]
    start = torch.cat([value.flatten() for value in loop_of("at").student.parameters()])
    assert (weights[1] - weights[0]).norm() < 0.1 * (weights[0] - start).norm()
    second.load(trained(first, [1]).state())
    assert bits(trained(second, [2])) == bits(whole)


def test_a_step_that_cannot_be_compiled_is_one_line(monkeypatch):
    loop = loop_of("baseline", compiled=True)

    class Missing(RuntimeError):
        __module__ = "torch._inductor.exc"

    def broken(*args):
        raise Missing("no compiler\nfound")

    monkeypatch.setattr(loop.train_step, "forward", broken)
    with pytest.raises(UserError, match="cannot be compiled .*--no-compile") as caught:
        trained(loop, [1])
    assert "\n" not in str(caught.value)


def test_only_a_long_run_is_compiled_unless_asked(tmp_path, monkeypatch):
    monkeypatch.setattr("fastkd.training.config.can_compile", lambda device: True)

    def plan(epochs, **more):
        return Config(
            Settings(
                "at",
                "digits",
                teacher="resnet8",
                student="resnet8",
                output=tmp_path,
                overrides={"epochs": epochs},
                **more,
            )
        )

    long = WORTH_COMPILING // 1437 + 1
    assert [plan(epochs).compiled for epochs in (8, long)] == [False, True]
    assert plan(8, compile=True).compiled and not plan(long, compile=False).compiled
    assert "compiled" in describe(plan(long)) and "compiled" not in describe(plan(8))
    assert plan(8).identity("student") != plan(8, compile=True).identity("student")
    with pytest.raises(UserError, match="--cuda-graph is for one process on a GPU"):
        plan(8, cuda_graph=True)
    monkeypatch.setattr("fastkd.training.config.can_compile", lambda device: False)
    assert not plan(long).compiled
