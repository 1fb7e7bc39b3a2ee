"""kd_loss: values, gradients and dtypes, under whatever backend is the default."""

from __future__ import annotations

import itertools

import formulas
import pytest
import torch
import torch.nn.functional as F
from support import DTYPES, check, make, name, ref, values

import fastkd

pytestmark = pytest.mark.usefixtures("one_thread")
LAYOUTS = ("contiguous", "swapped", "sliced", "stepped", "expanded_batch", "expanded_channels")


def kd_check(s, t, temperature=4.0, upstream=None, **switches):
    ours, exact = (lambda s, t, f=f: f(s, t, temperature, **switches) for f in (fastkd.kd_loss, ref.kd_loss))
    # every backend serves it by the same few lines
    check("reference", ours, exact, [s, t], upstream=upstream)


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum", "none"])
@pytest.mark.parametrize(
    "dtypes", list(itertools.product(DTYPES, DTYPES)), ids=lambda pair: "-".join(map(name, pair))
)
def test_kd_matches_the_reference_for_mixed_dtypes(dtypes, reduction):
    s, t = (5 * values((7, 13), dtype) for dtype in dtypes)
    kd_check(
        s,
        t,
        reduction=reduction,
        weight=0.9,
        upstream=torch.randn(7, 13) if reduction == "none" else torch.tensor(1.7),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("temperature", [0.5, 1, 4.0, 20.0])
def test_kd_matches_the_reference_in_every_layout(temperature, layout):
    kd_check(make((5, 10), layout=layout), make((5, 10), layout=layout), temperature)


@pytest.mark.parametrize("shape", [(1, 2), (1, 1000), (128, 2), (3, 5)], ids=name)
def test_kd_matches_the_reference_for_odd_shapes(shape):
    kd_check(values(shape, torch.float32), values(shape, torch.float32))


def test_kd_is_the_written_formula_at_the_defaults():
    s, t = values((6, 10), torch.float64), values((6, 10), torch.float64)
    torch.testing.assert_close(
        fastkd.kd_loss(s, t), formulas.kd_loss(s, t, 4.0, "batchmean"), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(fastkd.kd_loss(s, t), formulas.hinton(s, t), rtol=1e-12, atol=0)


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum", "none"])
@pytest.mark.filterwarnings("ignore:reduction. 'mean'")
def test_kd_is_finite_for_extreme_logits_where_the_textbook_form_is(reduction):
    s, t = (
        torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0]]),
        torch.tensor([[1e4, -1e4, 0.0], [3e4, 0.0, -3e4]]),
    )
    textbook = 16 * F.kl_div(F.log_softmax(s / 4, 1), F.softmax(t / 4, 1), reduction=reduction)
    assert textbook.isfinite().all()
    torch.testing.assert_close(fastkd.kd_loss(s, t, reduction=reduction), textbook)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum", "none"])
def test_kd_warns_of_nothing(reduction):
    fastkd.kd_loss(torch.randn(4, 5), torch.randn(4, 5), reduction=reduction)


def test_kd_gradient_in_half_precision_keeps_weight_and_loss_scale():
    s, t = values((64, 100), torch.float16), values((64, 100), torch.float16)
    kd_check(s, t, weight=0.9, upstream=torch.tensor(1024.0))


def test_kd_is_zero_for_equal_logits_and_for_itself():
    s = values((4, 9), torch.float32).requires_grad_()
    loss = fastkd.kd_loss(s, s)
    (grad,) = torch.autograd.grad(loss, s)
    assert loss.abs() < 1e-6 and grad.abs().max() < 1e-6


INF = float("inf")


@pytest.mark.parametrize("temperature, right", [(1.0, 0.2574), (4.0, 0.2796)])
def test_a_class_excluded_by_both_adds_nothing(temperature, right):
    s = torch.tensor([[1, 0.5, -INF]], requires_grad=True)
    t = torch.tensor([[1.0, 2, -INF]], requires_grad=True)
    loss = fastkd.kd_loss(s, t, temperature)
    assert loss.item() == pytest.approx(right, abs=5e-5)
    two = [x.detach()[:, :2].requires_grad_() for x in (s, t)]
    for grad, want in zip(
        torch.autograd.grad(loss, (s, t)), torch.autograd.grad(fastkd.kd_loss(*two, temperature), two)
    ):
        torch.testing.assert_close(grad, F.pad(want, (0, 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_class_excluded_by_the_teacher_alone_adds_nothing(dtype):
    s, t = (
        torch.tensor([[1, 0.5, 0.3]], dtype=dtype, requires_grad=True),
        torch.tensor([[1, 2, -INF]], dtype=dtype),
    )
    loss = fastkd.kd_loss(s, t)
    want = 16 * F.kl_div(F.log_softmax(s / 4, 1), F.softmax(t / 4, 1), reduction="batchmean")
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(*(torch.autograd.grad(value, s)[0] for value in (loss, want)))


@pytest.mark.parametrize(
    "teacher", [[1.0, 2, 3], [1.0, 2, -3000]], ids=["likely", "below the smallest number"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_class_excluded_by_the_student_alone_makes_the_loss_infinite(dtype, teacher):
    s, t = (
        torch.tensor([[1, 0.5, -INF]], dtype=dtype, requires_grad=True),
        torch.tensor([teacher], dtype=dtype),
    )
    loss = fastkd.kd_loss(s, t, 1.0)
    assert loss == INF
    (grad,) = torch.autograd.grad(loss, s)
    torch.testing.assert_close(grad, s.detach().softmax(1) - t.softmax(1))


def binary_by_hand(s, t, temperature):
    """The binary divergence of each class by probabilities, with the opposite class written out."""
    p, q = (1 / (1 + (-x / temperature).exp()) for x in (t, s))
    return temperature**2 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())


@pytest.mark.parametrize("classes", [1, 2, 7])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_sigmoid_takes_each_class_for_itself(classes, temperature):
    s, t = (values((5, classes), torch.float64).requires_grad_() for _ in range(2))
    exact = binary_by_hand(s, t, temperature)
    found = fastkd.kd_loss(s, t, temperature, activation="sigmoid", reduction="none")
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)
    for reduction, wanted in (
        ("sum", exact.sum()),
        ("mean", exact.mean()),
        ("batchmean", exact.sum(1).mean()),
    ):
        loss = fastkd.kd_loss(s, t, temperature, activation="sigmoid", reduction=reduction, weight=0.5)
        torch.testing.assert_close(loss, wanted * 0.5, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(
            torch.autograd.grad(loss, [s, t]),
            torch.autograd.grad(wanted * 0.5, [s, t], retain_graph=True),
            rtol=1e-7,
            atol=1e-9,
        )
    torch.testing.assert_close(fastkd.KD(temperature, activation="sigmoid")(s, t), exact.sum(1).mean())


def test_one_logit_is_the_softmax_of_it_and_zero():
    s, t = (values((6, 1), torch.float64) for _ in range(2))
    pairs = [torch.cat([x, torch.zeros_like(x)], 1) for x in (s, t)]
    torch.testing.assert_close(
        fastkd.kd_loss(s, t, activation="sigmoid"), fastkd.kd_loss(*pairs), rtol=1e-12, atol=0
    )


def test_the_sigmoid_is_finite_where_a_probability_underflows():
    s = torch.tensor([[300.0, -300.0, 0.0]], requires_grad=True)
    t = torch.tensor([[-500.0, 500.0, float("inf")]])
    loss = fastkd.kd_loss(s, t, 1.0, activation="sigmoid")
    loss.backward()
    assert loss.isfinite() and s.grad.isfinite().all()
    torch.testing.assert_close(loss, torch.tensor(600 + 0.6931472))


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float64), (torch.bfloat16, torch.float32)], ids=lambda p: name(p[0])
)
def test_the_identity_is_the_squared_error_of_outputs(classes, dtypes):
    s, t = (values((5, classes), dtype).requires_grad_() for dtype in dtypes)
    x, y = s.detach().double(), t.detach().double()
    exact = (x - y) ** 2
    for reduction, wanted in (("sum", exact.sum()), ("mean", exact.mean()), ("batchmean", exact.sum() / 5)):
        loss = fastkd.kd_loss(s, t, 3.0, activation="identity", reduction=reduction, weight=0.5)
        torch.testing.assert_close(loss.double(), wanted * 0.5, rtol=1e-6, atol=1e-12)
    (grad,) = torch.autograd.grad(loss, s)  # of the last, the mean over the batch
    torch.testing.assert_close(grad.double(), (x - y) / 5, rtol=2 * torch.finfo(s.dtype).eps, atol=1e-12)
    every = fastkd.kd_loss(s, t, activation="identity", reduction="none")
    torch.testing.assert_close(every.double(), exact, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "identity"])
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(6, 5), (3, 4, 5)], ids=name)
def test_what_is_masked_counts_nowhere(shape, reduction, activation):
    s, t = (values(shape, torch.float64) for _ in range(2))
    mask = torch.rand(shape[:-1]) < 0.6
    mask.flatten()[0], mask.flatten()[1] = True, False
    rest = {"reduction": reduction, "activation": activation, "weight": 3.0}
    exact_s, exact_t = (x[mask].requires_grad_() for x in (s, t))
    exact = fastkd.kd_loss(exact_s, exact_t, **rest)
    s[~mask], t[~mask] = float("nan"), float("inf")
    s.requires_grad_(), t.requires_grad_()
    found = fastkd.kd_loss(s, t, mask=mask, **rest)
    assert torch.equal(fastkd.KD(**rest)(s, t, mask), found)
    torch.testing.assert_close(found[mask] if reduction == "none" else found, exact, rtol=1e-12, atol=1e-12)
    if reduction == "none":
        assert found.shape == shape and not found[~mask].any()
    gradients, wanted = (
        torch.autograd.grad(y.sum(), x) for y, x in ((found, [s, t]), (exact, [exact_s, exact_t]))
    )
    for gradient, part in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient[mask], part, rtol=1e-12, atol=1e-12)
        assert not gradient[~mask].any()
    none = fastkd.kd_loss(s, t, mask=torch.zeros_like(mask), **rest)
    assert none.isfinite().all() and not none.any()


def test_a_mask_and_a_sigmoid_are_one_graph():
    torch._dynamo.reset()
    s, t, mask = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.tensor([[True, False, True]] * 2)
    for activation in ("sigmoid", "identity"):
        loss = fastkd.KD(activation=activation)
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(s, t, mask=mask), loss(s, t, mask=mask))


class Head(torch.nn.Module):
    """A head of one output on the mean of an image."""

    def __init__(self, outputs):
        super().__init__()
        self.fc = torch.nn.Linear(3, outputs)

    def forward(self, x):
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize(("outputs", "activation"), [(1, "identity"), (1, "sigmoid"), (3, "sigmoid")])
def test_the_method_takes_heads_of_regression_and_of_several_right_classes(outputs, activation):
    student, teacher = Head(outputs), Head(outputs)
    options = {"kd": {"activation": activation, "reduction": "mean", "weight": 2.0}}
    distillation = fastkd.Distillation(student, teacher, "kd", options=options)
    assert distillation.definition.changes["kd.activation"] == activation
    images = torch.randn(4, 3, 8, 8)
    losses = distillation(images)  # no labels, no cross-entropy
    wanted = fastkd.kd_loss(
        student(images), teacher(images), activation=activation, reduction="mean", weight=2.0
    )
    torch.testing.assert_close(losses.total, wanted)
    assert [*losses.terms] == ["kd"]
    with pytest.raises(
        ValueError, match="option kd.activation is 'relu', wanted one of softmax, sigmoid, id"
    ):
        fastkd.methods.define("kd", words=["kd.activation=relu"])


@pytest.mark.parametrize(
    ("s", "options", "error", "words"),
    [
        ((2, 3), {"activation": "tanh"}, ValueError, "activation is 'tanh', wanted one of 'softmax', 'sig"),
        ((2, 1), {}, ValueError, "teaches nothing, .* or activation='sigmoid'"),
        ((2, 3, 4), {}, ValueError, r"wanted \(N, K\) with"),
        ((2, 3), {"mask": torch.ones(2)}, TypeError, r"mask is \(2,\) float32 on cpu, wanted a"),
        ((2, 3), {"mask": [True, False]}, TypeError, "mask is list, wanted a tensor of bool"),
        ((2, 3), {"mask": torch.ones(3).bool()}, ValueError, r"mask is \(3,\) bool .* without the classes"),
        ((2, 3, 4), {"mask": torch.ones(2).bool()}, ValueError, "without the classes"),
    ],
)  # fmt: skip
def test_masks_and_activations_that_cannot_be_are_one_line(s, options, error, words):
    with pytest.raises(error, match=words) as caught:
        fastkd.kd_loss(torch.zeros(s), torch.zeros(s), **options)
    assert "\n" not in str(caught.value)
