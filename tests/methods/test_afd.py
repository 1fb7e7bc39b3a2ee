"""AFD: its worked figure, an independent form, and the maps that each network gives it."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from record_files import rows_in, rows_of

import fastkd
from fastkd.methods import BuildContext, define
from fastkd.methods.afd import AFD, Attention, differences, products_with_normed, weighted
from fastkd.models import Features, create_model
from fastkd.ops.pooled import pooled_map


def worked(shape, a):
    numbers = torch.arange(torch.Size(shape).numel())
    return (((numbers * a) % 11 - 5).double() / 10).view(shape)


def normed(x):
    mean = x.mean(0)
    return (x - mean) / (((x - mean) ** 2).mean(0) + 1e-5).sqrt()


def length_1(x):
    x = x.flatten(1)
    return x / (x**2).sum(1, keepdim=True).sqrt()


def averaged(x, size):
    """(N, H, W) -> (N, *size): the mean of rows floor(i H / side) to ceil((i + 1) H / side), and of columns
    alike, part by part.
    """

    def part(i, old, new):
        return slice(i * old // new, -(-(i + 1) * old // new))

    rows = [
        [
            x[:, part(i, x.shape[1], size[0]), part(j, x.shape[2], size[1])].mean((1, 2))
            for j in range(size[1])
        ]
        for i in range(size[0])
    ]
    return torch.stack([torch.stack(row, 1) for row in rows], 1)


def by_hand(students, teachers, weights):
    """Image by image, teacher's map by teacher's map. ``weights``: queries, keys, bilinear (weight, bias) and
    the two positions.
    """
    queries, keys, bilinear, p_t, p_s = weights
    n, count, d = len(students[0]), len(teachers), p_t.shape[1]
    q = [normed(t.mean((2, 3)) @ w.T + b) for t, (w, b) in zip(teachers, queries, strict=True)]
    k = [normed(s.mean((2, 3)) @ w.T + b).clamp_min(0) for s, (w, b) in zip(students, keys, strict=True)]
    rows = torch.cat([each[:, None] for each in k], 1).reshape(n * len(k), d)
    pairs = normed(rows @ bilinear[0].T + bilinear[1]).reshape(n, len(k), count, d)
    total = 0
    for b in range(n):
        for j, t in enumerate(teachers):
            scores = torch.stack(
                [(pairs[b, i, j] @ q[j][b] + p_t[j] @ p_s[i]) / d**0.5 for i in range(len(k))]
            ).exp()
            target = length_1((t[b : b + 1] ** 2).mean(1))
            for i, s in enumerate(students):
                value = length_1(averaged((s[b : b + 1] ** 2).mean(1), t.shape[2:]))
                total = total + scores[i] / scores.sum() * ((value - target) ** 2).mean()
    return total / n


def leaves_of(attention):
    """The parameters in the order of ``flat``."""
    layers = [*attention.queries, *attention.keys, attention.bilinear]
    return [x for layer in layers for x in (layer[0].weight, layer[0].bias)] + [attention.p_t, attention.p_s]


def flat(weights):
    queries, keys, bilinear, p_t, p_s = weights
    return [x for pair in (*queries, *keys, bilinear) for x in pair] + [p_t, p_s]


def attention_with(students, teachers, weights):
    attention = Attention(
        [x.shape[1] for x in students], [x.shape[1] for x in teachers], weights[3].shape[1]
    ).double()
    with torch.no_grad():
        for x, weight in zip(leaves_of(attention), flat(weights), strict=True):
            assert x.shape == weight.shape
            x.copy_(weight)
    return attention


def test_the_worked_figure():
    students, teachers = [worked((2, 2, 4, 4), 3), worked((2, 2, 2, 2), 7)], [worked((2, 3, 2, 2), 5)]
    weights = (
        [(worked((2, 3), 4), worked((2,), 2))],
        [(worked((2, 2), 6), worked((2,), 3)), (worked((2, 2), 8), worked((2,), 5))],
        (worked((2, 2), 9), worked((2,), 7)),
        worked((1, 2), 3),
        worked((2, 2), 4),
    )
    assert (
        abs(weighted(attention_with(students, teachers, weights), students, teachers).item() - 0.0385074784)
        <= 5e-11
    )
    assert abs(by_hand(students, teachers, weights).item() - 0.0385074784) <= 5e-11


@pytest.mark.parametrize("seed", range(30))
def test_values_and_gradients_by_hand(seed):
    torch.manual_seed(seed)
    chosen = random.Random(seed)
    n, d = chosen.choice((2, 3, 5)), chosen.choice((1, 2, 5))

    def some():
        # some are whole multiples of others, and some of equal size do not stand together
        known = ((4, 4), (2, 3), (5, 2), (8, 7), (3, 3), (2, 2), (8, 4))
        sizes = chosen.choices(known, k=chosen.choice((1, 2, 3, 5)))
        return [
            torch.randn(n, chosen.choice((1, 2, 5)), *size, dtype=torch.float64, requires_grad=True)
            for size in sizes
        ]

    def linear(a, b):
        return tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((b, a), (b,)))

    students, teachers = some(), some()
    queries, keys = ([linear(x.shape[1], d) for x in side] for side in (teachers, students))
    positions = [
        torch.randn(len(side), d, dtype=torch.float64, requires_grad=True) for side in (teachers, students)
    ]
    weights = (queries, keys, linear(d, d * len(teachers)), *positions)
    attention = attention_with(students, teachers, weights)
    found, wanted = weighted(attention, students, teachers), by_hand(students, teachers, weights)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    grads = torch.autograd.grad(found, [*students, *teachers, *leaves_of(attention)])
    exact = torch.autograd.grad(wanted, [*students, *teachers, *flat(weights)])
    torch.testing.assert_close(grads, exact, rtol=1e-6, atol=1e-8)


def attended(attention, students, teachers, layer_by_layer):
    """The weights, the gradients of all parameters and means, and the running averages after the call."""
    attention = copy.deepcopy(attention)
    if layer_by_layer:
        attention.bilinear[0].register_forward_hook(lambda *call: None)  # who looks on sees the layers
    means = [x.clone().requires_grad_() for x in (*students, *teachers)]
    found = attention(means[: len(students)], means[len(students) :])
    weights = torch.linspace(1, 2, found.numel(), dtype=found.dtype).view_as(found)
    grads = torch.autograd.grad((found * weights).sum(), [*means, *attention.parameters()])
    return [found, *grads, *attention.buffers()]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_keys_of_pairs_that_are_never_made_are_those_of_the_layers(training, monkeypatch):
    """Weights, gradients and running averages of the batch norm, also where a hook sees the layers."""
    attention = Attention([3, 4], [5, 2, 6], 7).double()
    for norm in (attention.bilinear[1], *(layer[1] for layer in attention.keys)):
        torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    sides = [[torch.randn(9, size).double() for size in sizes] for sizes in ((3, 4), (5, 2, 6))]
    attention(*sides)  # averages that are not those of the beginning
    attention.train(training)
    called = []
    monkeypatch.setattr(
        "fastkd.methods.afd.products_with_normed",
        lambda *inputs: called.append(inputs) or products_with_normed(*inputs),
    )
    found = attended(attention, *sides, layer_by_layer=False)
    assert len(called) == training
    wanted = attended(attention, *sides, layer_by_layer=True)
    assert len(called) == training
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


def test_what_is_set_upon_the_layers_as_a_whole_is_seen():
    """A hook of theirs runs, and layers that were wrapped or exchanged are called."""
    attention, sides = (
        Attention([3], [5, 2], 7),
        [[torch.randn(9, size) for size in x] for x in ((3,), (5, 2))],
    )
    wanted, called = attention(*sides), []
    attention.bilinear.register_forward_hook(lambda *inputs: called.append(inputs))
    torch.testing.assert_close(attention(*sides), wanted)
    assert len(called) == 1
    attention.bilinear = torch.nn.Sequential(attention.bilinear, torch.nn.Identity(), torch.nn.Identity())
    torch.testing.assert_close(attention(*sides), wanted)
    assert len(called) == 2


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_moments_are_float32_whatever_precision_products_have(precision):
    linear, norm = Attention([3], [5], 64).bilinear
    norm.momentum = 1.0
    keys, queries = torch.randn(99, 1, 64) + 3, torch.randn(99, 1, 64)
    wanted = (keys[:, 0].double() @ linear.weight.double().T).var(0).float()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        products_with_normed(linear, norm, keys, queries)
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(norm.running_var, wanted, rtol=1e-5, atol=0)


def test_half_precision_is_computed_in_float32():
    maps = [[(200 * torch.randn(3, 4, 4, 4)).to(dtype)] for dtype in (torch.float16, torch.bfloat16)]
    torch.manual_seed(1)
    attention = Attention([4], [4], 8)
    found = weighted(attention, *maps)
    wanted = weighted(attention.double(), *([x.double() for x in side] for side in maps))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted.float(), rtol=1e-4, atol=1e-7)
    zero = torch.zeros(2, 4, 4, 4, requires_grad=True)
    differences([pooled_map(zero)[0]], [torch.ones(2, 2, 2)]).sum().backward()
    assert not zero.grad.any()  # an empty map has no direction


@pytest.mark.parametrize(
    ("student", "teacher", "counts"),
    [("resnet8", "resnet20", (3, 9)), ("wrn_16_1", "resnet8", (6, 3)), ("resnet8", "wrn_16_2", (3, 6))],
)
def test_the_maps_of_every_block_after_a_relu(student, teacher, counts):
    torch.manual_seed(1)
    distillation = fastkd.Distillation(create_model(student), create_model(teacher), "afd", fold=False).eval()
    method, images = distillation.methods["afd"], torch.randn(2, 3, 32, 32)
    assert (len(method.attention.keys), len(method.attention.queries)) == counts
    sides = []
    for network in (distillation.student, distillation.teacher):
        plain, before = (network(images, features=features)[0].blocks for features in (True, "preact"))
        sides.append([x.relu() for x in before] if "Wide" in type(network).__name__ else plain)
    losses = distillation(images, torch.arange(2))
    torch.testing.assert_close(
        losses.terms["afd"], 200 * weighted(method.attention, *sides), rtol=1e-4, atol=1e-6
    )
    assert list(losses.terms) == ["ce", "afd", "kd"]


def test_of_a_resnet110_every_second_block():
    networks = create_model("resnet8"), create_model("resnet110")
    blocks = [tuple(torch.Size((i + 1, 2, 2)) for i in range(count)) for count in (3, 54)]
    context = BuildContext(*networks, *(Features((), (), None, side) for side in blocks), num_classes=10)
    method = AFD(context, AFD.Options(width=4))
    assert [layer[0].in_features for layer in method.attention.queries] == list(range(2, 55, 2)) and len(
        method.attention.keys
    ) == 3
    assert method.blocks(Features((), (), None, tuple(range(54))), 1) == list(range(1, 54, 2))


def test_it_is_one_graph_and_runs_under_autocast():
    torch.manual_seed(0)
    networks = create_model("wrn_16_1"), create_model("resnet8")
    distillation = fastkd.Distillation(
        *networks, "afd", fold=False, autocast=torch.autocast("cpu", torch.bfloat16)
    )
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    found = torch.compile(distillation, fullgraph=True, backend="eager")(images, labels)
    torch.testing.assert_close(found.total, distillation(images, labels).total, rtol=2e-2, atol=1e-2)
    found.total.backward()
    assert found.terms["afd"].dtype == torch.float32 and all(
        x.grad.isfinite().all() for x in distillation.methods.parameters()
    )
    assert distillation.methods["afd"].attention.p_s.grad.any() and networks[0].conv1.weight.grad.any()


def test_first_weights_options_and_what_comes_with_it():
    attention = Attention([3] * 40, [5] * 60, 128)
    for x in (attention.p_t, attention.p_s):  # xavier_normal
        assert abs(x.std().item() - (2 / sum(x.shape)) ** 0.5) < 0.05 * x.std()
    assert attention.bilinear[0].bias is not None and len(attention.queries[0]) == 2
    for name in ("afd", "afd+kd"):
        found = define(name)
        assert found.names == ("ce", "afd", "kd") and found.ce == 1 and found.terms[1].options.weight == 0.9
    with pytest.raises(ValueError, match="option afd: width is 0, wanted at least 1"):
        define("afd", options={"afd": {"width": 0}})
    plain = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10))
    with pytest.raises(
        ValueError, match="student shows 0 blocks and teacher 3: afd wanted at least one of each"
    ) as caught:
        fastkd.Distillation(plain, create_model("resnet8"), "afd")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_two_epochs_on_digits(small_main, tmp_path):
    flags = "--method afd --dataset digits --teacher resnet8 --student resnet8 --epochs 2".split()
    assert small_main([*flags, "--device", "cpu", "--output", str(tmp_path), "--no-pictures"]) == 0
    row = rows_of(tmp_path)[-1]
    lines = rows_in(tmp_path / row["folder"] / "epochs.csv")
    assert all(float(value) > 0 for line in lines for name, value in line.items() if "afd" in name)
