"""Features of the networks against a forward written by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from network_states import worn_in
from torch import Tensor

import fastkd
from fastkd.models import create_model


def normed(state: dict[str, Tensor], prefix: str, x: Tensor) -> Tensor:
    part = [
        state[f"{prefix}.{key}"].view(1, -1, 1, 1)
        for key in ("running_mean", "running_var", "weight", "bias")
    ]
    return (x - part[0]) / (part[1] + 1e-5).sqrt() * part[2] + part[3]


def resnet_by_hand(state, x, blocks, stem_padding=1):
    """(stem, [every block's sum before the ReLU], pooled, logits), from the state dict alone."""
    x = stem = normed(state, "bn1", F.conv2d(x, state["conv1.weight"], padding=stem_padding)).relu()
    sums = []
    for group in (1, 2, 3):
        for i in range(blocks):
            block, stride = f"layer{group}.{i}", 2 if group > 1 and i == 0 else 1
            out = normed(
                state, f"{block}.bn1", F.conv2d(x, state[f"{block}.conv1.weight"], stride=stride, padding=1)
            ).relu()
            out = normed(state, f"{block}.bn2", F.conv2d(out, state[f"{block}.conv2.weight"], padding=1))
            if f"{block}.downsample.0.weight" in state:
                x = normed(
                    state,
                    f"{block}.downsample.1",
                    F.conv2d(x, state[f"{block}.downsample.0.weight"], stride=stride),
                )
            sums.append(out + x)
            x = sums[-1].relu()
    pooled = x.mean((2, 3))
    return stem, sums, pooled, pooled @ state["fc.weight"].T + state["fc.bias"]


def wrn_by_hand(state, x, blocks):
    """(stem, [every block's raw sum], [the same after the next batch norm], pooled, logits)."""
    x = stem = F.conv2d(x, state["conv1.weight"], padding=1)
    sums, norms = [], []
    for group in (1, 2, 3):
        for i in range(blocks):
            block, stride = f"block{group}.layer.{i}", 2 if group > 1 and i == 0 else 1
            norms.append(normed(state, f"{block}.bn1", x))
            active = norms[-1].relu()
            out = normed(
                state,
                f"{block}.bn2",
                F.conv2d(active, state[f"{block}.conv1.weight"], stride=stride, padding=1),
            ).relu()
            out = F.conv2d(out, state[f"{block}.conv2.weight"], padding=1)
            shortcut = state.get(f"{block}.convShortcut.weight")
            x = out + (x if shortcut is None else F.conv2d(active, shortcut, stride=stride))
            sums.append(x)
    norms.append(normed(state, "bn1", x))
    pooled = norms[-1].relu().mean((2, 3))
    return stem, sums, norms[1:], pooled, pooled @ state["fc.weight"].T + state["fc.bias"]


def assert_same(found, wanted):
    """Two Features hold the same tensors in the same fields."""
    (left, one), (right, other) = (torch.utils._pytree.tree_flatten(tree) for tree in (found, wanted))
    assert one == other and all(x is y or torch.equal(x, y) for x, y in zip(left, right, strict=True))


@pytest.mark.parametrize(
    ("name", "blocks"), [("resnet8", 1), ("resnet20", 3), ("resnet8x4", 1), ("resnet_32_20", 3)]
)
def test_resnet_features_equal_a_forward_written_by_hand(name, blocks):
    model, x = worn_in(name, num_classes=7), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    stem, sums, pooled, logits = resnet_by_hand(model.state_dict(), x, blocks)
    for features, maps in ((True, [s.relu() for s in sums]), ("preact", sums)):
        found, found_logits = model(x, features=features)
        assert len(found.stages) == 3 and len(found.blocks) == 3 * blocks
        torch.testing.assert_close(list(found.blocks), maps)
        torch.testing.assert_close(list(found.stages), maps[blocks - 1 :: blocks])
        torch.testing.assert_close([found.stem, found.pooled, found_logits], [stem, pooled, logits])
        both = model(x, features="both")[0]
        assert_same(both.preact if features == "preact" else both._replace(preact=None), found)
    assert_same(model(x, features="pooled")[0], both._replace(stem=(), stages=(), blocks=(), preact=None))
    torch.testing.assert_close(both.final.mean((2, 3)), pooled)
    torch.testing.assert_close(model(x), logits)
    assert stem.shape[-1] == (28 if "_32_" in name else 32)


@pytest.mark.parametrize(("name", "blocks"), [("wrn_16_1", 2), ("wrn_16_2", 2)])
def test_wide_resnet_features_equal_a_forward_written_by_hand(name, blocks):
    model, x = worn_in(name, num_classes=7), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    stem, sums, norms, pooled, logits = wrn_by_hand(model.state_dict(), x, blocks)
    for features, maps in ((True, sums), ("preact", norms)):
        found, found_logits = model(x, features=features)
        torch.testing.assert_close(list(found.blocks), maps)
        torch.testing.assert_close(list(found.stages), maps[blocks - 1 :: blocks])
        torch.testing.assert_close([found.stem, found.pooled, found_logits], [stem, pooled, logits])
        both = model(x, features="both")[0]
        assert_same(both.preact if features == "preact" else both._replace(preact=None), found)
    assert_same(model(x, features="pooled")[0], both._replace(stem=(), stages=(), blocks=(), preact=None))
    torch.testing.assert_close(both.final.mean((2, 3)), pooled)
    torch.testing.assert_close(model(x), logits)


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1"])
def test_asking_for_features_changes_neither_gradients_nor_batch_norms(name):
    """Also: what is returned is not overwritten afterwards by an in-place ReLU or addition."""
    model, x = create_model(name), torch.randn(4, 3, 32, 32)
    start, results = {key: value.clone() for key, value in model.state_dict().items()}, []
    for features in (False, True, "preact", "both", "pooled"):
        model.load_state_dict(start)
        model.zero_grad()
        out = model.train()(x, features=features)
        loss = (out[1] if features else out).square().sum()
        loss.backward()
        results.append([*(p.grad.clone() for p in model.parameters()), *(b.clone() for b in model.buffers())])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])
    maps = model(x, features="preact")[0]
    before = [m.detach().clone() for m in maps.blocks]
    sum(m.square().mean() for m in maps.blocks).backward()
    torch.testing.assert_close([m.detach() for m in maps.blocks], before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "tap"), [("resnet8", "relu_tap"), ("resnet20", "relu_tap"), ("wrn_16_1", "tap")]
)
def test_a_tap_gives_the_maps_of_the_stages_and_changes_nothing_else(name, tap):
    """The student's gradient too is the same, taken on the way or from the features."""
    model, x = create_model(name).double(), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    start, results = {key: value.clone() for key, value in model.state_dict().items()}, []
    teacher = [torch.rand(3, size, size, dtype=torch.float64) for size in (32, 16, 8)]
    for taken in (None, getattr(fastkd.reference, tap), getattr(fastkd, tap)):
        model.load_state_dict(start)
        model.zero_grad()
        found, logits = model(x, features=True, tap=taken)
        maps = found.maps if taken else [fastkd.attention_map(f) for f in found.stages]
        (
            fastkd.attention_transfer_loss(
                maps, teacher, weight=1000.0, student_is_map=True, teacher_is_map=True
            )
            + logits.square().sum()
        ).backward()
        results.append(
            [
                *found.stages,
                *found.blocks,
                *maps,
                logits,
                *(p.grad for p in model.parameters()),
                *model.buffers(),
            ]
        )
        results[-1] = [v.detach().clone() for v in results[-1]]
    assert len(found.maps) == 3 and create_model(name)(x.float(), features=True)[0].maps == ()
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(model.eval()(x, tap=taken), model(x))
    for features in ("preact", "both", "pooled"):
        with pytest.raises(ValueError, match=features):
            model(x, features=features, tap=taken)
