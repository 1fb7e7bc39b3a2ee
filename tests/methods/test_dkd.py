"""DKD: its value by hand, the sum which is KD, what it may not do, and the method with its weights."""

from __future__ import annotations

import math

import formulas
import pytest
import torch
from support import DTYPES, evaluate, name, values

import fastkd
from fastkd.models import create_model

F64 = torch.float64
INF = math.inf


def by_hand(s, t, labels, temperature=4.0, alpha=1.0, beta=8.0, weight=1.0):
    """Sample by sample and class by class, by probabilities; gradients by autograd."""
    total = s.new_zeros(())
    for x, y, label in zip(s / temperature, t / temperature, labels.tolist(), strict=True):
        rest = [k for k in range(len(x)) if k != label]
        (q, others_q), (p, others_p) = (
            (e[label] / e.sum(), [e[k] / sum(e[j] for j in rest) for k in rest]) for e in (x.exp(), y.exp())
        )
        total = total + alpha * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())
        total = total + beta * sum(b * (b / a).log() for a, b in zip(others_q, others_p, strict=True))
    return weight * temperature**2 * total / len(s)


def test_the_value_of_one_sample_by_hand():
    """Probabilities of the student 1/2, 1/4, 1/4, of the teacher 1/4, 1/2, 1/4; the label is the first."""
    s, t = torch.tensor([[2.0, 1, 1]], dtype=F64).log(), torch.tensor([[1.0, 2, 1]], dtype=F64).log()
    first = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    second = 2 / 3 * math.log(2 / 3 / 0.5) + 1 / 3 * math.log(1 / 3 / 0.5)
    for alpha, beta in ((1.0, 0.0), (0.0, 1.0), (2.0, 3.0)):
        found = fastkd.dkd_loss(s, t, torch.tensor([0]), 1.0, alpha=alpha, beta=beta)
        assert found.item() == pytest.approx(alpha * first + beta * second, abs=1e-14)


@pytest.mark.parametrize(
    "dtypes", [(a, b) for a in DTYPES for b in DTYPES], ids=lambda p: "-".join(map(name, p))
)
def test_values_and_gradients_are_those_of_the_formula(dtypes):
    s, t = (3 * values((6, 9), dtype) for dtype in dtypes)
    labels = torch.tensor([0, 8, 3, 3, 7, 1])
    options = {"temperature": 2.0, "alpha": 0.7, "beta": 1.3, "weight": 0.9}
    found = evaluate(lambda s, t: fastkd.dkd_loss(s, t, labels, **options), [s, t])
    exact = evaluate(lambda s, t: by_hand(s, t, labels, **options), [s.double(), t.double()])
    double = F64 in dtypes
    assert found.output.dtype == (F64 if double else torch.float32)
    torch.testing.assert_close(found.output.double(), exact.output, rtol=1e-12 if double else 2e-6, atol=0)
    for grad, wanted, dtype in zip(found.grads, exact.grads, dtypes, strict=True):
        tolerance = 1e-11 if dtype == F64 else max(4 * torch.finfo(dtype).eps, 4e-6)
        assert grad.dtype == dtype
        torch.testing.assert_close(grad.double(), wanted, rtol=tolerance, atol=tolerance)


def test_it_is_the_published_form_where_that_is_exact():
    s, t, labels = values((5, 100), F64), values((5, 100), F64), torch.tensor([99, 0, 5, 5, 42])
    found = evaluate(lambda s, t: fastkd.dkd_loss(s, t, labels), [s, t])
    theirs = evaluate(lambda s, t: formulas.mdistiller_dkd(s, t, labels, 1.0, 8.0, 4.0), [s, t])
    torch.testing.assert_close(found.output, theirs.output, rtol=1e-11, atol=0)
    # with respect to the student's logits: the teacher's gradient is NaN there
    torch.testing.assert_close(found.grads[0], theirs.grads[0], rtol=1e-9, atol=1e-13)


def test_with_the_teachers_own_share_as_beta_it_is_kd():
    s, t, labels = values((4, 6), F64), values((4, 6), F64), torch.tensor([5, 0, 2, 2])
    shares = 1 - (t / 4).softmax(1).gather(1, labels[:, None])[:, 0]
    parts = [
        fastkd.dkd_loss(s[i : i + 1], t[i : i + 1], labels[i : i + 1], alpha=1, beta=float(share))
        for i, share in enumerate(shares)
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), fastkd.kd_loss(s, t), rtol=1e-12, atol=0)


def test_it_is_finite_where_probabilities_underflow():
    """The published form is infinite there: it takes the logarithm of a sum that is 0."""
    s = torch.tensor([[900.0, 0, -900], [0, 0, 0]], requires_grad=True)
    t, labels = torch.tensor([[-800.0, 800, 0], [1e4, 0, 5]]), torch.tensor([0, 0])
    assert not formulas.mdistiller_dkd(s, t, labels, 1.0, 8.0, 1.0).isfinite()
    loss = fastkd.dkd_loss(s, t, labels, 1.0)
    loss.backward()
    assert loss.isfinite() and s.grad.isfinite().all()
    torch.testing.assert_close(loss.detach(), by_parts(s.detach().double(), t.double(), labels).float())


def by_parts(s, t, labels):
    """As the formula, from logarithms that do not underflow."""
    total = s.new_zeros(())
    for x, y, label in zip(s, t, labels.tolist(), strict=True):
        rest = torch.tensor([k for k in range(len(x)) if k != label])
        odds = [z[label] - z[rest].logsumexp(0) for z in (x, y)]
        p = odds[1].sigmoid()
        logs = [(torch.nn.functional.logsigmoid(o), torch.nn.functional.logsigmoid(-o)) for o in odds]
        total = total + p * (logs[1][0] - logs[0][0]) + (1 - p) * (logs[1][1] - logs[0][1])
        a, b = x[rest].log_softmax(0), y[rest].log_softmax(0)
        total = total + 8 * (b.exp() * (b - a)).sum()
    return total / len(s)


def test_a_class_that_the_teacher_excludes_adds_nothing():
    s = values((3, 5), F64).requires_grad_()
    t, labels = values((3, 4), F64), torch.tensor([0, 3, 1])
    wider = torch.cat([t, torch.full((3, 1), -INF, dtype=F64)], 1)
    fastkd.dkd_loss(s, wider, labels, alpha=0).backward()
    assert s.grad.isfinite().all() and (s.grad[:, 4] > 0).all()  # its share goes to the others


def test_it_is_differentiable_twice_and_one_graph():
    s, t = (values((3, 4), F64).requires_grad_() for _ in range(2))
    labels = torch.tensor([3, 0, 1])
    assert torch.autograd.gradgradcheck(lambda s, t: fastkd.dkd_loss(s, t, labels), [s, t])
    torch._dynamo.reset()
    loss = fastkd.DKD(beta=2.0)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(s, t, labels), loss(s, t, labels))


def test_presets_and_fields():
    s, t, labels = values((3, 4), F64), values((3, 4), F64), torch.tensor([3, 0, 1])
    for preset, options in (
        ("mdistiller", {"temperature": 4.0, "alpha": 1.0, "beta": 8.0}),
        ("imagenet", {"temperature": 1.0, "alpha": 1.0, "beta": 0.5}),
    ):
        exact = by_hand(s, t, labels, **options, weight=2.0)
        torch.testing.assert_close(fastkd.DKD.preset(preset, weight=2.0)(s, t, labels), exact)


LABELS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("shape", "labels", "options", "error", "words"),
    [
        ((2, 2), LABELS, {}, ValueError, "of two classes one alone is left"),
        ((2, 1), LABELS, {}, ValueError, r"student_logits is \(2, 1\)"),
        ((2, 4, 4), LABELS, {}, ValueError, r"student_logits is \(2, 4, 4\) .* wanted \(N, K\)"),
        ((2, 4), [0, 1], {}, TypeError, "labels is list, wanted a tensor of int64"),
        ((2, 4), LABELS.float(), {}, TypeError, r"labels is \(2,\) float32 on cpu, wanted a tensor of int64"),
        ((3, 4), LABELS, {}, ValueError, r"labels is \(2,\) int64 on cpu, wanted \(3,\) on cpu"),
        ((2, 4), torch.tensor([0, 4]), {}, ValueError, "labels has 4, wanted 0 to 3: there are 4 classes"),
        ((2, 4), torch.tensor([-1, 3]), {}, ValueError, "labels has -1, wanted 0 to 3"),
        ((2, 4), LABELS, {"beta": INF}, ValueError, "beta is inf, wanted a finite number"),
        ((2, 4), LABELS, {"alpha": "1"}, TypeError, "alpha is '1' .str., wanted a number"),
        ((2, 4), LABELS, {"temperature": 0}, ValueError, "temperature is 0"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(shape, labels, options, error, words):
    with pytest.raises(error, match=words) as caught:
        fastkd.dkd_loss(torch.zeros(shape), torch.zeros(shape), labels, **options)
    assert "\n" not in str(caught.value)


def pair(teacher, student, classes=4):
    return create_model(student, classes), create_model(teacher, classes)


@pytest.mark.parametrize(
    ("networks", "beta"),
    [
        (("resnet20", "resnet8"), 2.0),
        (("wrn_16_2", "wrn_16_1"), 6.0),
        (("wrn_16_2", "resnet8"), 6.0),
        (("resnet8x4", "resnet8x4"), 8.0),
    ],
)
def test_the_method_takes_its_authors_beta_for_the_pair(networks, beta):
    made = fastkd.Distillation(*pair(*networks), "dkd", fold=False)
    assert made.settled() == {"dkd.beta": beta} and made.methods["dkd"].function.beta == beta
    given = fastkd.Distillation(*pair(*networks), "dkd", options={"dkd": {"beta": 3}}, fold=False)
    assert given.settled() == {} and given.methods["dkd"].function.beta == 3.0


def test_the_method_is_the_loss_beside_cross_entropy_and_grows(one_thread):
    student, teacher = pair("resnet8", "resnet8")
    made = fastkd.Distillation(student, teacher, "dkd", preset="mdistiller", fold=False).eval()
    images, labels = torch.randn(3, 3, 32, 32), torch.tensor([0, 3, 2])
    wanted = by_hand(student(images).double(), teacher(images).double(), labels, beta=2.0).float()
    for epoch, factor in ((0, 1 / 20), (9, 0.5), (19, 1.0), (200, 1.0)):
        made.set_epoch(epoch, 240)
        losses = made(images, labels)
        torch.testing.assert_close(losses.terms["dkd"], wanted * factor, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(losses.total, losses.terms["ce"] + losses.terms["dkd"])
    with pytest.raises(ValueError, match="labels are None: dkd tells the labelled class"):
        made(images)
    with pytest.raises(ValueError, match="num_classes is 2: dkd wanted at least 3 classes, or kd"):
        fastkd.Distillation(*pair("resnet8", "resnet8", 2), "dkd")
    with pytest.raises(ValueError, match="warmup is 2.0, wanted a fraction of the run"):
        fastkd.methods.define("dkd", words=["warmup=2"])
