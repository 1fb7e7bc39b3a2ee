"""What was seen of timm and torchvision: each is one line of a list of surprises, with the right values."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastkd

FOUR = ["layer1", "layer2", "layer3", "layer4"]


@pytest.fixture
def timm():
    return pytest.importorskip("timm")


@pytest.fixture
def torchvision():
    return pytest.importorskip("torchvision")


def images(size=32, n=2):
    return torch.randn(n, 3, size, size)


def grad_of(features):
    sum(x.square().mean() for x in features).backward()


def test_timms_norms_count_their_batches_and_stay_in_eval_mode(timm):
    model = timm.create_model("resnet18", num_classes=7)
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    model.layer2.eval()
    before = copy.deepcopy(model.state_dict())
    extractor = fastkd.extract(model, FOUR)
    for _ in range(5):
        grad_of(extractor(images())[0])
    assert norm.num_batches_tracked == 5 and not model.layer2[0].bn1.training
    assert torch.equal(model.layer2[0].bn1.running_mean, before["layer2.0.bn1.running_mean"])
    assert not torch.equal(model.layer1[0].bn1.running_mean, before["layer1.0.bn1.running_mean"])


@pytest.mark.parametrize("name", ["resnet18", "mobilevit_xxs", "mobilenetv3_small_050"])
def test_features_in_eval_mode_are_timms_own_to_the_bit(timm, name):
    torch.manual_seed(0)
    model, x = timm.create_model(name, num_classes=7).eval(), images(64)
    with torch.no_grad():
        wanted = model.forward_intermediates(x, intermediates_only=True)
        points = [info["module"] for info in model.feature_info]
        features, logits = fastkd.extract(model, points)(x)
        assert torch.equal(logits, model(x))
    matched = [any(f.shape == w.shape and torch.equal(f, w) for w in wanted) for f in features]
    assert len(matched) >= 4 and all(matched[1:])


def test_maps_of_timms_swin_have_their_channels_first(timm):
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=7, depths=(1, 1, 1, 1)).eval()
    names = ["layers.0", "layers.1", "patch_embed.proj"]
    with torch.no_grad():
        features, _ = fastkd.extract(model, names)(images(224, 1))
        wanted = model.forward_intermediates(images(224, 1), intermediates_only=True)
    assert [tuple(x.shape) for x in features] == [(1, 96, 56, 56), (1, 192, 28, 28), (1, 96, 56, 56)]
    assert wanted[0].shape == features[0].shape


def test_a_model_of_features_only_may_be_passed(timm):
    model = timm.create_model("resnet18", features_only=True, out_indices=(1, 2))
    features, output = fastkd.extract(model, ["layer1", "layer2"])(images())
    assert isinstance(output, list) and torch.equal(features[1], output[1])


def test_torchvisions_features_are_as_they_left_the_module(torchvision):
    torch.manual_seed(0)
    model, x = torchvision.models.resnet18(num_classes=7).eval(), images()
    model.train()
    model.layer1[0].bn2.eval()
    modes = [m.training for m in model.modules()]
    features, _ = fastkd.extract(model, ["layer1.0.bn1", "layer1.0.bn2", "layer1.0"])(x)
    assert modes == [m.training for m in model.modules()]
    stem = copy.deepcopy(model).maxpool(model.relu(model.bn1(model.conv1(x))))
    block = model.layer1[0]
    bn1 = block.bn1(block.conv1(stem))
    bn2 = block.bn2(block.conv2(bn1.relu()))
    torch.testing.assert_close(features, [bn1, bn2, (bn2 + stem).relu()], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "point", "options"),
    [
        ("swin_t", "features.1.0.attn.qkv", {}),
        ("swin_t", "features.1.0.attn.proj", {}),
        ("vit_b_16", "encoder.layers.encoder_layer_0.self_attention.out_proj", {"image_size": 32}),
        ("googlenet", "aux1", {"init_weights": False, "aux_logits": True}),
    ],
)
def test_points_that_never_run_are_named(torchvision, name, point, options):
    model = getattr(torchvision.models, name)(weights=None, num_classes=7, **options).eval()
    with torch.no_grad(), pytest.raises(ValueError, match=rf"names\[0\] '{point}' did not run") as caught:
        fastkd.extract(model, [point])(images())
    assert "\n" not in str(caught.value)


def test_timms_fused_attention_has_no_dropout_to_look_at(timm):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=7, depth=2)
    with pytest.raises(ValueError, match="'blocks.0.attn.attn_drop' did not run in this forward pass"):
        fastkd.extract(model, ["blocks.0.attn.attn_drop"])(images())


def test_tokens_of_a_transformer_teach_as_maps(timm):
    student, teacher = (
        timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=7, depth=2) for _ in range(2)
    )
    points = [(f"blocks.{i}", lambda x: fastkd.tokens_to_map(x, prefix=1)) for i in range(2)]
    named = {"student_points": points, "teacher_points": points}
    distillation = fastkd.Distillation(student, teacher, "at+rkd", preset="repdistiller", **named).eval()
    x = images(64)
    losses = distillation(x, torch.arange(2))
    maps = [fastkd.extract(network, points)(x)[0] for network in (student, teacher)]
    assert [tuple(y.shape) for y in maps[0]] == [(2, 192, 4, 4)] * 2
    torch.testing.assert_close(losses.terms["at"], fastkd.attention_transfer_loss(*maps, weight=1000.0))
    losses.total.backward()
    assert student.patch_embed.proj.weight.grad.any()


@pytest.mark.parametrize("method", ["ofd", "simkd", "norm", "srrl", "reviewkd"])
def test_methods_that_ask_most_of_a_network(timm, torchvision, method):
    """timm's ResNet-18 learns from torchvision's ResNet-34; what is added has names of its own."""
    torch.manual_seed(0)
    student = timm.create_model("resnet18", num_classes=7)
    teacher = torchvision.models.resnet34(num_classes=7)
    names = set(student.state_dict())
    distillation = fastkd.Distillation(student, teacher, method, student_points=FOUR, teacher_points=FOUR,
                                       image_shape=(3, 64, 64))  # fmt: skip
    losses = distillation(images(64), torch.arange(2))
    losses.total.backward()
    assert losses.terms[method].isfinite() and student.conv1.weight.grad.any()
    assert {key.split(".")[0] for key in set(student.state_dict()) - names} <= {"neck"}
    if method == "ofd":
        norms = distillation._observed[1].norms_before_relu()
        assert norms == tuple(getattr(teacher, name)[-1].bn2 for name in FOUR)


def test_a_network_in_train_mode_that_gives_several_outputs_is_one_line(torchvision):
    student = torchvision.models.googlenet(weights=None, num_classes=7, init_weights=False)
    teacher = torchvision.models.resnet18(num_classes=7)
    distillation = fastkd.Distillation(student, teacher, "kd")
    with pytest.raises(TypeError, match=r"student GoogLeNet gives GoogLeNetOutputs, wanted logits \(N, K\)"):
        distillation.train()(images(64), torch.arange(2))
    with pytest.raises(
        ValueError, match=r"image_shape is \(3, 32, 32\): student Inception3 does not take such"
    ) as caught:
        fastkd.Distillation(
            torchvision.models.inception_v3(weights=None, num_classes=7, init_weights=False), teacher, "kd"
        )
    assert "\n" not in str(caught.value)


def test_a_network_without_a_linear_layer_teaches_by_its_logits(torchvision):
    student, teacher = (torchvision.models.squeezenet1_1(num_classes=7) for _ in range(2))
    fastkd.Distillation(student, teacher, "kd")(images(64), torch.arange(2)).total.backward()
    with pytest.raises(ValueError, match="classifier is None, and student SqueezeNet calls no nn.Linear"):
        fastkd.Distillation(student, teacher, "rkd")
