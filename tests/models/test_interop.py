"""What was seen of timm and torchvision: each is one line of a list of surprises, with the right values."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastkd

FOUR = ["layer1", "layer2", "layer3", "layer4"]


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


TWINS = [(f"blocks.{i}.1", fastkd.tokens_to_map) for i in range(4)]
# (points, None for those that timm declares; pixels; options): most of them torchvision's extractor cannot
# trace
TIMMS = {
    "resnet18": (None, 64, {}),
    "mobilenetv3_small_050": (None, 64, {}),
    "mobilevit_xxs": (None, 64, {}),
    "mobilevitv2_050": (None, 64, {}),
    "efficientvit_b0": (None, 64, {}),
    "efficientvit_m0": (None, 224, {}),
    "tiny_vit_5m_224": (None, 64, {}),
    # the names that timm declares for these two are of no submodules
    "twins_svt_small": (TWINS, 64, {"depths": (2, 2, 2, 2)}),
    "hrnet_w18_small": (["act1", *(f"incre_modules.{i}" for i in range(4))], 64, {}),
}


@pytest.mark.parametrize("name", TIMMS)
def test_features_in_eval_mode_are_timms_own_to_the_bit(timm, name):
    torch.manual_seed(0)
    points, pixels, options = TIMMS[name]
    model, x = timm.create_model(name, num_classes=7, **options).eval(), images(pixels)
    points = points or [info["module"] for info in model.feature_info]
    with torch.no_grad():
        wanted = model.forward_intermediates(x, intermediates_only=True)
        features, logits = fastkd.extract(model, points)(x)
        assert torch.equal(logits, model(x))
    assert len(features) == len(wanted) >= 3
    assert all(torch.equal(*pair) for pair in zip(features, wanted, strict=True))


def test_a_name_that_timm_declares_for_no_submodule_is_one_line(timm):
    model = timm.create_model("hrnet_w18_small", num_classes=7)
    with pytest.raises(
        ValueError, match="names: model has no submodule 'stem', wanted one such as "
    ) as caught:
        fastkd.extract(model, ["stem"])
    assert "\n" not in str(caught.value)


def test_maps_of_timms_swin_have_their_channels_first(timm):
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=7, depths=(1, 1, 1, 1)).eval()
    names = ["layers.0", "layers.1", "patch_embed.proj"]
    with torch.no_grad():
        features, _ = fastkd.extract(model, names)(images(224, 1))
        wanted = model.forward_intermediates(images(224, 1), intermediates_only=True)
    assert [tuple(x.shape) for x in features] == [(1, 96, 56, 56), (1, 192, 28, 28), (1, 96, 56, 56)]
    assert wanted[0].shape == features[0].shape


class Wrapped(nn.Module):
    """As DistributedDataParallel and users' own modules do, it keeps the network as a submodule."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


@pytest.mark.parametrize(
    ("options", "wrap", "names"),
    [
        ({"features_only": True}, False, ["layers_0", "layers_1"]),
        ({"features_only": True}, True, ["module.layers_0", "module.layers_1"]),
        ({"features_only": True, "feature_cls": "hook"}, False, ["layers_0", "layers_1"]),
        ({"features_only": True, "feature_cls": "getter"}, False, ["model.layers.0", "model.layers.1"]),
        ({"num_classes": 7}, True, ["module.layers.0", "module.layers.1"]),
    ],
)
def test_a_swin_that_is_wrapped_has_its_channels_first_too(timm, options, wrap, names):
    model = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), **options).eval()
    model, x = Wrapped(model) if wrap else model, images(224, 1)
    with torch.no_grad():
        features, output = fastkd.extract(model, names)(x)
    assert [tuple(x.shape) for x in features] == [(1, 96, 56, 56), (1, 192, 28, 28)]
    if options.get("feature_cls") == "getter":  # which declares its own output, not its submodules', NCHW
        assert torch.equal(features[1], output[1])


def test_a_swin_inside_distributed_data_parallel_has_its_channels_first(timm, tmp_path):
    distributed = torch.distributed
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'met'}", rank=0, world_size=1)
    try:
        swin = timm.create_model("swin_tiny_patch4_window7_224", num_classes=7, depths=(1, 1, 1, 1))
        parallel = nn.parallel.DistributedDataParallel(swin)
        with torch.no_grad():
            (feature,), _ = fastkd.extract(parallel, ["module.layers.0"])(images(224, 1))
    finally:
        distributed.destroy_process_group()
    assert tuple(feature.shape) == (1, 96, 56, 56)


def test_torchvisions_swin_is_turned_by_a_function(torchvision):
    model = torchvision.models.swin_t(weights=None, num_classes=7).eval()
    with torch.no_grad():
        (turned,), _ = fastkd.extract(model, [("features.1", lambda x: x.permute(0, 3, 1, 2))])(images(64))
    assert tuple(turned.shape) == (2, 96, 16, 16)


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
        ("inception_v3", "AuxLogits", {"init_weights": False, "aux_logits": True}),
    ],
)
def test_points_that_never_run_are_named(torchvision, name, point, options):
    model = getattr(torchvision.models, name)(weights=None, num_classes=7, **options).eval()
    with torch.no_grad(), pytest.raises(ValueError, match=rf"names\[0\] '{point}' did not run") as caught:
        fastkd.extract(model, [point])(images(options.get("image_size", 96)))
    assert "\n" not in str(caught.value)


def test_all_points_that_did_not_run_are_named_in_one_line(torchvision):
    model = torchvision.models.googlenet(weights=None, num_classes=7, init_weights=False, aux_logits=True)
    wanted = r"^names\[0\] 'aux1', names\[2\] 'aux2' did not run in this forward pass of GoogLeNet"
    with torch.no_grad(), pytest.raises(ValueError, match=wanted):
        fastkd.extract(model.eval(), ["aux1", "conv1", "aux2"])(images())


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
    distillation = fastkd.Distillation(
        student, teacher, method, student_points=FOUR, teacher_points=FOUR, image_shape=(3, 64, 64)
    )
    losses = distillation(images(64), torch.arange(2))
    losses.total.backward()
    assert losses.terms[method].isfinite() and student.conv1.weight.grad.any()
    assert {key.split(".")[0] for key in set(student.state_dict()) - names} <= {"neck"}
    if method == "ofd":
        norms = distillation.views[1].norms_before_relu()
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
