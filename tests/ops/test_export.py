"""Networks and losses through torch.export to a file and back, and on the meta device, which has shapes
alone.
"""

from __future__ import annotations

import io

import pytest
import torch
from support import cpp_missing
from torch import nn

import fastkd

pytestmark = [pytest.mark.unpoisoned, pytest.mark.usefixtures("one_thread")]
CPP = pytest.param(
    "cpp", marks=pytest.mark.skipif(bool(cpp_missing()), reason=f"backend cpp: {cpp_missing()}")
)


def saved_and_loaded(program):
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


class WithFeatures(nn.Module):
    def __init__(self, name, features):
        super().__init__()
        self.net, self.features = fastkd.models.create_model(name).eval(), features

    def forward(self, images):
        return self.net(images, features=self.features)


@pytest.mark.parametrize("name, features", [("resnet8", True), ("wrn_16_1", "preact")])
def test_a_network_with_features_is_exported_to_a_file(name, features):
    model, images = WithFeatures(name, features), torch.randn(2, 3, 32, 32)
    got, logits = saved_and_loaded(torch.export.export(model, (images,)))(images)
    want, _ = model(images)
    assert type(got) is fastkd.models.Features
    for a, b in zip(
        [*got.stages, *got.blocks, got.stem, got.pooled],
        [*want.stages, *want.blocks, want.stem, want.pooled],
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(logits, model.net(images))


class Distilled(nn.Module):
    """A student with its losses, as a program that computes one number."""

    def __init__(self):
        super().__init__()
        self.student = fastkd.models.create_model("resnet8")
        self.kd, self.at, self.fsp = fastkd.KD(), fastkd.AttentionTransfer(weight=1000.0), fastkd.FSP()

    def forward(self, images, logits, stages):
        features, own = self.student(images, features=True)
        return self.kd(own, logits) + self.at(features.stages, stages) + self.fsp(features.stages, stages)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("backend", ["auto", CPP])
def test_a_student_with_its_losses_is_exported_to_a_file(backend, strict):
    model = Distilled().eval()
    stages = [torch.randn(2, c, n, n) for c, n in ((16, 32), (32, 16), (64, 8))]
    inputs = torch.randn(2, 3, 32, 32), torch.randn(2, 10), stages
    with fastkd.use_backend(backend):
        program = torch.export.export(model, inputs, strict=strict)
    graphs = [
        module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)
    ]
    ours = {str(node.target) for graph in graphs for node in graph.nodes if "fastkd" in str(node.target)}
    assert ours == (
        set() if backend == "auto" else {"fastkd.attention_transfer_loss.default", "fastkd.fsp_loss.default"}
    )
    torch.testing.assert_close(saved_and_loaded(program)(*inputs), model(*inputs), rtol=1e-4, atol=1e-6)


X, Y = (torch.empty(2, c, n, n, device="meta", dtype=torch.float16) for c, n in ((3, 4), (4, 2)))
LOGITS = torch.empty(2, 5, device="meta")
ON_META = {
    "attention_map": lambda: fastkd.attention_map(X),
    "attention_transfer_loss": lambda: fastkd.attention_transfer_loss([X, Y], [Y, X]),
    "fsp_matrix": lambda: fastkd.fsp_matrix(X, Y),
    "fsp_loss": lambda: fastkd.fsp_loss([X, Y], [X, Y]),
    "kd_loss": lambda: fastkd.kd_loss(LOGITS, LOGITS),
    "tap": lambda: fastkd.tap(X)[1],
    "relu_tap": lambda: fastkd.relu_tap(X, X)[1],
}
SHAPES = {"attention_map": (2, 4, 4), "tap": (2, 4, 4), "relu_tap": (2, 4, 4), "fsp_matrix": (2, 3, 4)}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("function", ON_META)
def test_every_function_runs_on_the_meta_device(function, backend):
    with fastkd.use_backend(backend):
        y = ON_META[function]()
    assert (y.device.type, y.dtype, tuple(y.shape)) == ("meta", torch.float32, SHAPES.get(function, ()))


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1"])
def test_a_step_runs_on_the_meta_device(name):
    with torch.device("meta"):
        student, images = fastkd.models.create_model(name), torch.empty(2, 3, 32, 32)
    student = student.to(memory_format=torch.channels_last)
    features, logits = student(images.to(memory_format=torch.channels_last), features=True)
    stages = [x.detach() for x in features.stages]
    loss = fastkd.attention_transfer_loss(features.stages, stages) + fastkd.fsp_loss(features.stages, stages)
    (loss + fastkd.kd_loss(logits, logits.detach())).backward()
    assert all(p.grad.shape == p.shape and p.grad.is_meta for p in student.parameters())
