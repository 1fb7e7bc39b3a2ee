"""FSP of networks whose channels differ, by trained 1x1 convolutions."""

from __future__ import annotations

import pytest
import torch
from record_files import rows_of
from support_data import QUICK

import fastkd
from fastkd.models import create_model

ADAPTED = {"fsp": {"adapter": "1x1"}}


def test_the_loss_is_that_of_the_convolved_maps_and_trains_the_convolutions(one_thread):
    student, teacher = create_model("wrn_16_1").eval(), create_model("wrn_16_2").eval()
    made = fastkd.Distillation(student, teacher, "fsp", options=ADAPTED, fold=False).eval()
    own = dict(made.methods["fsp"].named_parameters())
    # the stem has 16 channels in both, the stages 16, 32, 64 and 32, 64, 128
    assert [tuple(x.shape) for x in own.values()] == [(32, 16, 1, 1), (64, 32, 1, 1), (128, 64, 1, 1)]
    images = torch.randn(3, 3, 32, 32)
    losses = made(images, torch.arange(3))
    (mine, _), (theirs, _) = (network(images, features=True) for network in (student, teacher))
    maps = [torch.einsum("oc,nchw->nohw", w[:, :, 0, 0], x) for w, x in zip(own.values(), mine.stages)]
    chains = [mine.stem, *maps], [theirs.stem, *theirs.stages]
    wanted = sum(
        (product(s, b) - product(t, d)).square().mean()
        for (s, b), (t, d) in zip(*(list(zip(chain, chain[1:])) for chain in chains))
    )
    torch.testing.assert_close(losses.terms["fsp"], wanted, rtol=1e-4, atol=1e-5)
    losses.terms["fsp"].backward()
    assert all(x.grad.any() for x in own.values()) and student.conv1.weight.grad.any()


def product(a, b):
    """The FSP matrix of two maps, the first averaged to the size of the second."""
    a = torch.nn.functional.adaptive_avg_pool2d(a, b.shape[2:])
    return torch.einsum("nahw,nbhw->nab", a, b) / b[0, 0].numel()


def test_equal_channels_get_none_and_unequal_ones_are_refused_without_it():
    student, teacher = create_model("resnet8"), create_model("resnet8")
    made = fastkd.Distillation(student, teacher, "fsp", options=ADAPTED, fold=False)
    assert not list(made.methods.parameters())
    words = (
        r"student's stage 0 is \(16, 32, 32\), teacher's is \(32, 32, 32\): fsp wanted equal channels, or ad"
    )
    with pytest.raises(ValueError, match=words):
        fastkd.Distillation(student, create_model("resnet8x4"), "fsp")


def test_a_run_says_it_and_keeps_them_in_its_checkpoint(small_main, tmp_path, capsys):
    quick = ["wrn_16_2" if before == "--teacher" else word for before, word in zip(["", *QUICK], QUICK)]
    flags = ["--method", "fsp", *quick, "--epochs", "1"]
    assert small_main([*flags, "--option", "fsp.adapter=1x1", "--output", str(tmp_path)]) == 0
    row = rows_of(tmp_path)[-1]
    assert "fsp.adapter=1x1" in row["overrides"] and "fsp.adapter=1x1" in capsys.readouterr().out
    state = torch.load(tmp_path / row["folder"] / "last.pt", weights_only=True)
    assert sorted(state["method"]) == [f"fsp.adapters.{i}.weight" for i in (1, 2, 3)]
    assert (
        len(state["optimizer"]["param_groups"][0]["params"])
        == len([*create_model("resnet8").parameters()]) + 3
    )
