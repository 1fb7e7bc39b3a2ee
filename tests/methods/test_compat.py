"""fastkd.compat: the signatures of two other projects and the numbers their own formulas give."""

from __future__ import annotations

import inspect

import formulas
import pytest
import torch
import torch.nn.functional as F
from support import evaluate, values

import fastkd
from fastkd.compat import kdzoo, repdistiller

pytestmark = pytest.mark.usefixtures("one_thread")
F64 = torch.float64


def parameters(function) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


@pytest.mark.parametrize(
    "module, init, forward",
    [
        (repdistiller.Attention, ["p"], ["g_s", "g_t"]),
        (repdistiller.FSP, ["s_shapes", "t_shapes"], ["g_s", "g_t"]),
        (repdistiller.DistillKL, ["T"], ["y_s", "y_t"]),
        (kdzoo.AT, ["p"], ["fm_s", "fm_t"]),
        (kdzoo.FSP, [], ["fm_s1", "fm_s2", "fm_t1", "fm_t2"]),
        (kdzoo.SoftTarget, ["T"], ["out_s", "out_t"]),
    ],
    ids=lambda x: f"{x.__module__}.{x.__name__}" if isinstance(x, type) else "",
)
def test_signatures_are_the_originals(module, init, forward):
    assert issubclass(module, torch.nn.Module)
    own_init = parameters(module.__init__) if "__init__" in vars(module) else []
    assert (own_init, parameters(module.forward)) == (init, forward)


def same(ours, theirs, tensors) -> None:
    a, b = evaluate(ours, tensors), evaluate(theirs, tensors)
    torch.testing.assert_close(a.output, b.output, rtol=1e-10, atol=0)
    torch.testing.assert_close(a.grads, b.grads, rtol=1e-9, atol=1e-13)


def chain(sizes=(9, 5, 4), channels=(4, 3, 6)):
    return [values((2, c, s, s), F64) for c, s in zip(channels, sizes)]


@pytest.mark.parametrize("p", [None, 1, 2, 3])
def test_repdistiller_attention_gives_one_loss_a_stage(p):
    s, t = chain(), chain((9, 8, 2), (7, 7, 7))
    module = repdistiller.Attention() if p is None else repdistiller.Attention(p)
    out = module(s, t)
    assert isinstance(out, list) and len(out) == 3

    def published(*x):
        return sum(10**i * formulas.repdistiller_at(x[i], x[3 + i], p or 2) for i in range(3))

    same(lambda *x: sum(10**i * loss for i, loss in enumerate(module(x[:3], x[3:]))), published, [*s, *t])


def test_repdistiller_fsp_gives_one_loss_a_pair_and_refuses_unequal_channels():
    s, t = chain(), chain()
    module = repdistiller.FSP([x.shape for x in s], [x.shape for x in t])
    out = module(s, t)
    assert isinstance(out, list) and len(out) == 2
    a, b = formulas.repdistiller_fsp(s), formulas.repdistiller_fsp(t)
    for i in range(2):
        torch.testing.assert_close(out[i], (a[i] - b[i]).pow(2).mean(), rtol=1e-10, atol=0)
    with pytest.raises(ValueError, match="channels"):
        repdistiller.FSP([x.shape for x in s], [x.shape for x in chain(channels=(4, 3, 7))])


@pytest.mark.parametrize("module", [repdistiller.DistillKL, kdzoo.SoftTarget])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_targets_are_hintons(module, temperature):
    same(
        module(temperature),
        lambda s, t: formulas.hinton(s, t, temperature),
        [values((5, 10), F64), values((5, 10), F64)],
    )


@pytest.mark.parametrize("p", [1, 2.0, 2.7, 3])
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_kdzoo_attention_serves_one_stage(scale, p):
    s, t = scale * values((2, 4, 7, 7), F64), values((2, 9, 7, 7), F64)
    same(kdzoo.AT(p), lambda s, t: formulas.kdzoo_at(s, t, p), [s, t])


@pytest.mark.parametrize("sizes", [(6, 6), (8, 4)])
def test_kdzoo_fsp_serves_one_pair(sizes):
    tensors = [*chain(sizes, (4, 7)), *chain(sizes, (4, 7))]

    def published(*x):
        (a,), (b,) = formulas.bmm_fsp(x[:2]), formulas.bmm_fsp(x[2:])
        return (a - b).pow(2).mean()

    same(kdzoo.FSP(), published, tensors)


def test_repdistiller_takes_the_shorter_of_two_lists_and_any_iterable():
    s, t = chain(), chain()
    attention, fsp = repdistiller.Attention(), repdistiller.FSP([x.shape for x in s], [x.shape for x in t])
    for longer, shorter in ((s, t[:2]), (s[:2], t)):
        assert torch.equal(torch.stack(attention(longer, shorter)), torch.stack(attention(s, t)[:2]))
        assert torch.equal(torch.stack(fsp(longer, shorter)), torch.stack(fsp(s, t)[:1]))
    for module in (attention, fsp):
        assert torch.equal(torch.stack(module(iter(s), dict(enumerate(t)))), torch.stack(module(s, t)))


@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("teacher_size", [5, 9, 12])
def test_repdistiller_attention_has_the_originals_helpers(teacher_size, p):
    s, t = values((2, 3, 9, 9), F64), values((2, 4, teacher_size, teacher_size), F64)
    module = repdistiller.Attention(p)
    assert module.at(s).shape == (2, 81)
    same(module.at, lambda f: F.normalize(f.pow(p).mean(1).view(f.size(0), -1)), [s])
    same(module.at_loss, lambda s, t: formulas.repdistiller_at(s, t, p), [s, t])


def test_repdistiller_fsp_has_the_originals_helpers():
    s, t = chain(), chain()
    module = repdistiller.FSP([x.shape for x in s], [x.shape for x in t])
    a, b = module.compute_fsp(s), module.compute_fsp(t)
    for made, published in zip(a, formulas.repdistiller_fsp(s), strict=True):
        torch.testing.assert_close(made, published, rtol=1e-10, atol=1e-14)
    losses = [module.compute_loss(x, y) for x, y in zip(a, b)]
    torch.testing.assert_close(losses, module(s, t), rtol=1e-10, atol=0)


def test_repdistiller_soft_targets_of_maps_are_divided_by_the_batch_alone():
    def published(y_s, y_t, T=4.0):
        return (
            F.kl_div(F.log_softmax(y_s / T, 1), F.softmax(y_t / T, 1), reduction="sum") * T**2 / y_s.shape[0]
        )

    same(repdistiller.DistillKL(4.0), published, [values((3, 5, 2, 7), F64), values((3, 5, 2, 7), F64)])
    with pytest.raises(ValueError, match="student_logits"):
        fastkd.kd_loss(values((3, 5, 2, 7), F64), values((3, 5, 2, 7), F64))
    with pytest.raises(ValueError, match="student_logits"):
        repdistiller.DistillKL(4.0)(values((3, 5, 2, 7), F64), values((3, 5, 2, 8), F64))


def test_kdzoo_has_the_originals_helpers():
    a, b = values((2, 4, 8, 8), F64), values((2, 5, 4, 4), F64)
    module = kdzoo.AT(2.0)

    def published(fm, eps=1e-6):
        q = fm.abs().pow(2.0).sum(1, keepdim=True)
        return q / (torch.norm(q, dim=(2, 3), keepdim=True) + eps)

    assert module.attention_map(a).shape == (2, 1, 8, 8)
    same(module.attention_map, published, [1e-3 * a])
    same(lambda x: module.attention_map(x, 0.5), lambda x: published(x, 0.5), [a])
    same(kdzoo.FSP().fsp_matrix, lambda a, b: formulas.bmm_fsp([a, b])[0], [a, b])
