"""Models: sizes, published names, what they return, and whose weights they take."""

from __future__ import annotations

import pytest
import torch
from network_states import worn_in

import fastkd
from fastkd.models import MODELS, create_model

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
    for arguments, words in (
        ((20,), "name is 20, wanted the name of a model"),
        (("resnet20", "10"), "num_classes is '10', wanted a whole number"),
        (("resnet20", 2.5), "num_classes is 2.5, wanted a whole number"),
    ):
        with pytest.raises(TypeError, match=f"^{words}"):
            create_model(*arguments)


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
