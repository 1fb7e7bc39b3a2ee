"""SemCKD: its worked figure, an independent form, its batch, and its weight on digits."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from record_files import rows_of

import fastkd
from fastkd.methods import BuildContext, create_method, define
from fastkd.methods.semckd import SemCKD, calibration
from fastkd.models import Features, create_model
from fastkd.training import Settings
from fastkd.training.config import Config


def worked(shape, a):
    numbers = torch.arange(torch.Size(shape).numel())
    return (((numbers * a) % 11 - 5).double() / 10).view(shape)


def equal_parts(x, size):
    """Averages of equal parts: the sizes here divide each other."""
    size = [min(a, b) for a, b in zip(x.shape[2:], size, strict=True)]
    return x.view(*x.shape[:2], size[0], x.shape[2] // size[0], size[1], x.shape[3] // size[1]).mean((3, 5))


def normed(x):
    mean = x.mean((0, 2, 3), keepdim=True)
    return (x - mean) / (((x - mean) ** 2).mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()


def by_hand(students, teachers, queries, keys, regressors, soft):
    """Image by image and pair by pair. ``queries``, ``keys``: four tensors each; ``regressors[i][j]``: three
    convolutions.
    """

    def embedded(x, layers):
        x = x.flatten(1)
        similar = torch.einsum("bd,cd->bc", x, x)
        out = (similar @ layers[0].T + layers[1]).clamp_min(0) @ layers[2].T + layers[3]
        return out / (out**2).sum(1, keepdim=True).sqrt()

    q = [embedded(x, layers) for x, layers in zip(students, queries, strict=True)]
    k = [embedded(x, layers) for x, layers in zip(teachers, keys, strict=True)]
    total, n = 0, len(students[0])
    for i, s in enumerate(students):
        scores = torch.stack([(q[i] * each).sum(1) / soft for each in k], 1).exp()
        for j, t in enumerate(teachers):
            x = equal_parts(s, t.shape[2:])
            for weight in regressors[i][j][:2]:
                x = normed(F.conv2d(x, weight, padding=weight.shape[2] // 2)).clamp_min(0)
            x = F.conv2d(x, regressors[i][j][2])
            difference = ((x - equal_parts(t, x.shape[2:])) ** 2).flatten(1)
            total = total + (scores[:, j] / scores.sum(1) * difference.sum(1) / difference.shape[1]).sum()
    return total / (n * len(students))


def context_of(students, teachers, batch_size):
    """A context of shapes alone."""
    sides = [Features((), tuple(x.shape[1:] for x in side), None, ()) for side in (students, teachers)]
    return BuildContext(None, None, *sides, num_classes=10, batch_size=batch_size)


def method_with(students, teachers, queries, keys, regressors, batch_size, **options):
    """The method in float64 with these weights."""
    method = SemCKD(context_of(students, teachers, batch_size), SemCKD.Options(**options)).double()
    pairs = [*zip([*method.queries, *method.keys], [*queries, *keys], strict=True)]
    pairs += [
        pair for rows in zip(method.regressors, regressors, strict=True) for pair in zip(*rows, strict=True)
    ]
    with torch.no_grad():
        for module, weights in pairs:
            found = [x for x in module.parameters() if len(weights) == 4 or x.dim() == 4]
            for x, weight in zip(found, weights, strict=True):
                assert x.shape == weight.shape
                x.copy_(weight)
    return method


def loss_of(method, students, teachers):
    outputs = [
        fastkd.methods.Output(None, Features((), tuple(side), None, ())) for side in (students, teachers)
    ]
    return method.loss(None, *outputs, method.connect(None, *outputs))


def test_the_worked_figure():
    students, teachers = [worked((2, 2, 4, 4), 3)], [worked((2, 3, 4, 4), 5), worked((2, 2, 2, 2), 7)]
    queries = [[worked((4, 2), 2), worked((4,), 3), worked((2, 4), 4), worked((2,), 6)]]
    keys = [
        [worked((4, 2), 7), worked((4,), 8), worked((2, 4), 9), worked((2,), 3)],
        [worked((4, 2), 5), worked((4,), 2), worked((2, 4), 3), worked((2,), 7)],
    ]
    regressors = [
        [
            [worked((6, 2, 1, 1), 2), worked((6, 6, 3, 3), 3), worked((3, 6, 1, 1), 4)],
            [worked((4, 2, 1, 1), 4), worked((4, 4, 3, 3), 5), worked((2, 4, 1, 1), 6)],
        ]
    ]
    method = method_with(students, teachers, queries, keys, regressors, batch_size=2, beta=1.0, factor=1)
    assert abs(loss_of(method, students, teachers).item() - 0.3377238100) <= 5e-11
    assert abs(by_hand(students, teachers, queries, keys, regressors, 1.0).item() - 0.3377238100) <= 5e-11


@pytest.mark.parametrize("seed", range(30))
def test_values_and_gradients_by_hand(seed):
    torch.manual_seed(seed)
    chosen = random.Random(seed)
    n, factor, soft = chosen.choice((4, 5, 7)), chosen.choice((1, 2, 4)), chosen.choice((0.5, 1.0, 3.0))

    def some():
        sizes = chosen.choices(((4, 4), (2, 2), (4, 2), (8, 4), (1, 1)), k=chosen.choice((1, 2, 3)))
        return [
            torch.randn(n, chosen.choice((1, 2, 3)), *size, dtype=torch.float64, requires_grad=True)
            for size in sizes
        ]

    students, teachers, width = some(), some(), n // factor
    layers = [
        [
            torch.randn(shape, dtype=torch.float64) / 4 + 0.05
            for shape in ((2 * width, n), (2 * width,), (width, 2 * width), (width,))
        ]
        for _ in [*students, *teachers]
    ]
    queries, keys = layers[: len(students)], layers[len(students) :]
    regressors = []
    for s in students:
        sizes = [(s.shape[1], t.shape[1]) for t in teachers]
        regressors.append(
            [
                [
                    torch.randn(shape, dtype=torch.float64)
                    for shape in ((2 * t, s, 1, 1), (2 * t, 2 * t, 3, 3), (t, 2 * t, 1, 1))
                ]
                for s, t in sizes
            ]
        )
    method = method_with(students, teachers, queries, keys, regressors, n, beta=0.5, soft=soft, factor=factor)
    for weights in [*layers, *(weights for row in regressors for weights in row)]:
        for weight in weights:
            weight.requires_grad_()
    found, wanted = (
        loss_of(method, students, teachers),
        0.5 * by_hand(students, teachers, queries, keys, regressors, soft),
    )
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)
    ours = [
        *students,
        *teachers,
        method.queries[0][0].weight,
        method.keys[-1][2].weight,
        method.regressors[0][-1][3].weight,
    ]
    theirs = [*students, *teachers, queries[0][0], keys[-1][2], regressors[0][-1][1]]
    grads, exact = (torch.autograd.grad(loss, leaves) for loss, leaves in ((found, ours), (wanted, theirs)))
    torch.testing.assert_close(grads, exact, rtol=1e-6, atol=1e-8)


def test_similarities_of_half_precision_do_not_overflow():
    maps = [[(100 * torch.randn(4, 2, 4, 4)).half()] for _ in range(2)]
    method = SemCKD(context_of(*maps, 4), SemCKD.Options())
    found = method.attention(*(tuple(side) for side in maps))
    assert found.dtype == torch.float32 and found.isfinite().all()
    loss = calibration(
        [[torch.full((4, 2, 4, 4), 300.0).half()]], (torch.zeros(4, 2, 4, 4).half(),), torch.ones(4, 1, 1)
    )
    assert loss.dtype == torch.float32 and loss == 90_000


def test_the_batch_must_be_known_and_have_four_images():
    networks = create_model("resnet8"), create_model("resnet8")
    for size in (None, 1, 3):
        with pytest.raises(
            ValueError, match=f"batch_size is {size}, wanted at least 4 images a process"
        ) as caught:
            fastkd.Distillation(*networks, "semckd", batch_size=size)
        assert "\n" not in str(caught.value)
    distillation = fastkd.Distillation(*networks, "semckd", batch_size=5, fold=False)
    with pytest.raises(
        ValueError, match="images has 4 of them, wanted 5: semckd is built for that batch_size"
    ):
        distillation(torch.randn(4, 3, 32, 32))
    assert distillation(torch.randn(5, 3, 32, 32)).total.isfinite()
    for options, words in (
        ({"soft": 0.0}, "soft is 0.0, wanted a number above 0"),
        ({"factor": 0}, "factor is 0, wanted at least 1"),
    ):
        with pytest.raises(ValueError, match=f"option semckd: {words}"):
            define("semckd", options={"semckd": options})


@pytest.mark.parametrize(
    ("student", "teacher"), [("resnet8", "resnet8x4"), ("wrn_16_1", "resnet8"), ("resnet8", "wrn_16_1")]
)
def test_every_pair_runs_under_autocast_and_the_last_as_one_graph(student, teacher):
    torch.manual_seed(2)
    networks = create_model(student), create_model(teacher)
    rest = {"batch_size": 4, "autocast": torch.autocast("cpu", torch.bfloat16), "fold": False}
    distillation = fastkd.Distillation(*networks, "semckd", **rest)
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    losses = distillation(images, labels)
    assert list(losses.terms) == ["ce", "semckd", "kd"] and losses.terms["semckd"].dtype == torch.float32
    if teacher == "wrn_16_1":  # of one pair, since it takes its time
        compiled = torch.compile(distillation, fullgraph=True, backend="eager")(images, labels)
        torch.testing.assert_close(losses.total, compiled.total, rtol=2e-2, atol=1e-2)
    losses.total.backward()
    assert all(x.grad.isfinite().all() for x in distillation.parameters())
    assert networks[0].conv1.weight.grad.any()


def test_it_comes_with_kd_and_cross_entropy_of_weight_1():
    for name in ("semckd", "semckd+kd"):
        found = define(name)
        assert (
            found.names == ("ce", "semckd", "kd")
            and found.ce == 1
            and found.terms[1].options.weight == 1
            and found.whole_batches
        )
    assert (
        define("semckd").terms[0].options.beta
        == 400
        == define("semckd", preset="simkd").terms[0].options.beta
    )
    context = BuildContext.of(create_model("resnet8"), create_model("resnet8"), batch_size=8)
    method = create_method("semckd", context)
    assert method.queries[0][0].weight.shape == (4, 8) and method.queries[0][2].weight.shape == (2, 4)


@pytest.mark.parametrize(
    ("said", "beta"),
    [([], 40.0), (["beta=400"], 400.0), (["semckd.preset=semckd"], 400.0), (["semckd.soft=2"], 40.0)],
)
def test_a_run_repeats_with_the_weight_that_it_had(small_main, tmp_path, said, beta):
    """On digits the published weight must be asked for, so a command has it where it was."""
    common = {
        "dataset": "digits",
        "teacher": "resnet8",
        "student": "resnet8",
        "device": "cpu",
        "output": tmp_path,
        "pictures": False,
    }
    first = Config(Settings("semckd", **common, options=said))
    again = Config(Settings("semckd", **common, options=first.options()))
    for found in (first, again):
        assert found.method.terms[0].options.beta == beta and f"semckd.beta={beta}" in found.options()
    assert first.identity("student") == again.identity("student")


@pytest.mark.slow
@pytest.mark.parametrize(("said", "beta"), [([], 40.0), (["--option", "beta=50"], 50.0)])
def test_two_epochs_of_whole_batches_and_the_weight_of_digits(small_main, tmp_path, capsys, said, beta):
    flags = "--method semckd --dataset digits --teacher resnet8 --student resnet8 --no-pictures".split()
    length = ["--epochs", "2" if not said else "1", "--batch-size", "24"]
    assert small_main([*flags, *length, "--device", "cpu", "--output", str(tmp_path), *said]) == 0
    out = " ".join(capsys.readouterr().out.split())  # the screen wraps its lines
    noted = "the published 400 is infinite there after a few steps" in out
    assert f"semckd.beta={beta}" in out and noted == (not said)
    row = rows_of(tmp_path)[-1]
    assert f"semckd.beta={beta}" in ",".join(row.values()) and float(row["acc"]) > 0
