"""Models: sizes, published names, what they return, and whose weights they take."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from fastkd.models import MODELS, WeightsError, create_model, load_weights

# trainable parameters for 10 and 100 classes
SIZES = {
    "resnet8": (78_042, 83_892),
    "resnet20": (272_474, 278_324),
    "resnet32": (466_906, 472_756),
    "resnet44": (661_338, 667_188),
    "resnet56": (855_770, 861_620),
    "resnet110": (1_730_714, 1_736_564),
    "resnet8x4": (1_210_410, 1_233_540),
    "resnet32x4": (7_410_730, 7_433_860),
    "wrn_16_1": (175_066, 180_916),
    "wrn_16_2": (691_674, 703_284),
    "wrn_40_1": (563_930, 569_780),
    "wrn_40_2": (2_243_546, 2_255_156),
    "resnet_32_20": (274_394, 280_244),
    "resnet_32_110": (1_732_634, 1_738_484),
}


def test_every_model_has_the_published_number_of_parameters():
    assert set(MODELS) == set(SIZES)
    for name in MODELS:
        with torch.device("meta"):
            found = tuple(
                sum(p.numel() for p in create_model(name, classes).parameters()) for classes in (10, 100)
            )
        assert found == SIZES[name], name


def test_an_unknown_model_is_told_with_the_known_ones():
    with pytest.raises(ValueError, match=r"resnet21.*resnet20.*wrn_40_2"):
        create_model("resnet21")


def norm_names(prefix: str) -> set[str]:
    return {
        f"{prefix}.{part}"
        for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }


def published_names(name: str) -> set[str]:
    """The state-dict names of RepDistiller's resnet20 and wrn_16_2, written out from its layout."""
    names = {"conv1.weight", "fc.weight", "fc.bias"} | norm_names("bn1")
    if name == "resnet20":
        for group in (1, 2, 3):
            for i in range(3):
                block = f"layer{group}.{i}"
                names |= (
                    {f"{block}.conv1.weight", f"{block}.conv2.weight"}
                    | norm_names(f"{block}.bn1")
                    | norm_names(f"{block}.bn2")
                )
            if group > 1:
                names |= {f"layer{group}.0.downsample.0.weight"} | norm_names(f"layer{group}.0.downsample.1")
    else:
        for group in (1, 2, 3):
            for i in range(2):
                block = f"block{group}.layer.{i}"
                names |= (
                    {f"{block}.conv1.weight", f"{block}.conv2.weight"}
                    | norm_names(f"{block}.bn1")
                    | norm_names(f"{block}.bn2")
                )
            names.add(f"block{group}.layer.0.convShortcut.weight")
    return names


@pytest.mark.parametrize("name", ["resnet20", "wrn_16_2"])
def test_state_dict_names_are_the_published_ones(name):
    assert set(create_model(name).state_dict()) == published_names(name)


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


def worn_in(name: str, **options) -> torch.nn.Module:
    """A model in float64 whose batch norms are no longer what they were initialized to."""
    model = create_model(name, **options).double()
    for key, value in model.state_dict().items():
        if "running_var" in key or ("bn" in key and key.endswith("weight")):
            value.uniform_(0.5, 1.5)
        elif "running_mean" in key or ("bn" in key and key.endswith("bias")):
            value.normal_(0, 0.3)
    return model.eval()


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


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1"])
def test_models_compile_as_one_graph_and_keep_channels_last(name):
    model = create_model(name).to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    features = model(x, features=True)[0]
    assert all(m.is_contiguous(memory_format=torch.channels_last) for m in (features.stem, *features.blocks))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for wanted in (True, "preact", "both", "pooled"):
        expected, got = model(x, features=wanted), compiled(x, features=wanted)
        torch.testing.assert_close(
            [*got[0].stages, got[1]], [*expected[0].stages, expected[1]], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1"])
def test_the_neck_and_the_classifier_may_be_exchanged(name):
    class Shown(fastkd.models.Neck):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(64, 7, 1)

        def forward(self, x, record=None):
            inner = self.conv(x)
            if record is not None:
                record.neck = inner
            return inner.relu()

    model, x = create_model(name).eval(), torch.randn(2, 3, 32, 32)
    before = model(x, features=True)[0]
    assert before.neck is None and not [key for key in model.state_dict() if key.startswith("neck")]
    model.neck, model.fc = Shown(), torch.nn.Linear(7, 5)
    for features in (True, "preact", "both", "pooled"):
        found, logits = model(x, features=features)
        torch.testing.assert_close(found.neck, model.neck.conv(before.final))
        torch.testing.assert_close(found.final, found.neck.relu())
        torch.testing.assert_close(logits, model.fc(found.final.mean((2, 3))))
    torch.testing.assert_close(model(x), logits)
    model.neck = torch.nn.Conv2d(64, 7, 1)  # one that shows nothing
    assert model(x, features=True)[0].neck is None and model(x).shape == (2, 5)


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_2"])
def test_the_norms_before_the_relu_are_those_of_the_maps(name):
    """Of a ResNet the sums before the ReLU hold a shortcut too, so it is taken away: of the norm alone the
    map is an affine one.
    """
    model, x = worn_in(name), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    outputs, handles = [], []
    norms = model.norms_before_relu()
    for norm in norms:
        handles.append(
            norm.register_forward_hook(lambda module, args, output: outputs.append(output.clone()))
        )
    stages = model(x, features="preact")[0].stages
    assert [norm.num_features for norm in norms] == [stage.shape[1] for stage in stages]
    if name.startswith("wrn"):
        assert all(map(torch.equal, outputs, stages))
    else:
        blocks = [group[-1] for group in (model.layer1, model.layer2, model.layer3)]
        assert all(norm is block.bn2 for norm, block in zip(norms, blocks, strict=True))


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1"])
def test_an_unknown_choice_of_features_is_refused(name):
    with pytest.raises(
        ValueError, match="features is 'all', wanted one of False, True, 'preact', 'both', 'pooled'"
    ):
        create_model(name)(torch.zeros(2, 3, 32, 32), features="all")


@pytest.mark.parametrize("form", ["bare", "model", "DataParallel", "before 0.4.1"])
def test_weights_load_bare_or_under_model(tmp_path, form):
    source, target = create_model("wrn_16_1", 5), create_model("wrn_16_1", 5)
    source(torch.randn(4, 3, 32, 32))
    state = source.state_dict()
    if form == "DataParallel":
        state = {f"module.{key}": value for key, value in state.items()}
    if form == "before 0.4.1":
        state = {key: value for key, value in state.items() if "num_batches" not in key}
    torch.save({"model": state, "epoch": 3} if form == "model" else state, tmp_path / "w.pth")
    loaded = load_weights(target, tmp_path / "w.pth")
    assert (loaded.get("epoch") == 3) == (form == "model")
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(target.eval()(x), source.eval()(x), rtol=0, atol=0)


class Evil:
    def __reduce__(self):
        return (os.mkdir, (os.environ["FASTKD_TEST_EVIL"],))


def foreign_file(kind: str, path: Path) -> Path:
    state = create_model("resnet8").state_dict()
    if kind == "truncated":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "no checkpoint":
        path.write_text("weights")
    elif kind == "code":
        path.write_bytes(pickle.dumps(Evil()))
    elif kind == "a list":
        torch.save([1, 2], path)
    elif kind == "no tensors":
        torch.save({"model": {"lr": 0.1}}, path)
    elif kind == "layout":
        torch.save(create_model("wrn_16_1").state_dict(), path)
    elif kind == "classes":
        torch.save(create_model("resnet8", 100).state_dict(), path)
    elif kind == "width":
        torch.save(state | {"conv1.weight": torch.randn(32, 3, 3, 3)}, path)
    elif kind == "nan":
        torch.save(state | {"fc.weight": state["fc.weight"] * float("nan")}, path)
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "No such file"),
        ("truncated", "truncated"),
        ("no checkpoint", "not a checkpoint"),
        ("code", "not a checkpoint"),
        ("a list", "holds a list"),
        ("no tensors", "no state dict"),
        ("layout", "another layout"),
        ("classes", "trained for 100 classes, wanted 10"),
        ("width", r"is \(32, 3, 3, 3\), the model wants \(16, 3, 3, 3\)"),
        ("nan", "not finite"),
    ],
)
def test_a_file_that_does_not_fit_is_told_in_one_line_and_runs_no_code(tmp_path, monkeypatch, kind, words):
    monkeypatch.setenv("FASTKD_TEST_EVIL", str(tmp_path / "evil"))
    model = create_model("resnet8")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(WeightsError, match=words) as caught:
        load_weights(model, foreign_file(kind, tmp_path / "w.pth"))
    assert "\n" not in str(caught.value) and str(tmp_path / "w.pth") in str(caught.value)
    assert not (tmp_path / "evil").exists()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.skipif(
    not (os.environ.get("FASTKD_RESNET56_CIFAR100") and os.environ.get("FASTKD_DATA")),
    reason=(
        "set FASTKD_RESNET56_CIFAR100 to the published teacher of settings a and b, and FASTKD_DATA to a"
        " folder with CIFAR-100"
    ),
)
def test_the_published_resnet56_has_its_published_accuracy():
    """CRGuan/SAKD's teacher, published with 73.03 %; loader, model, data set and normalization together."""
    from fastkd.training import Batches, evaluate, load_dataset
    from fastkd.training.recipes import NORMALIZATIONS

    data = load_dataset("cifar100", Path(os.environ["FASTKD_DATA"]))
    model = create_model("resnet56", 100)
    load_weights(model, os.environ["FASTKD_RESNET56_CIFAR100"])
    mean, std = NORMALIZATIONS["ofd"]
    test = Batches(data.test_images, data.test_labels, mean, std, batch_size=500)
    accuracy = evaluate(
        model.to(memory_format=torch.channels_last), test, torch.autocast("cpu", enabled=False)
    )
    assert accuracy == pytest.approx(73.04, abs=0.011)
