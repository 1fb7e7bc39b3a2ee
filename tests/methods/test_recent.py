"""CRD against a queue of the latest embeddings, or against those of the batch."""

from __future__ import annotations

import io

import pytest
import torch

import fastkd
from fastkd.methods import define
from fastkd.methods.recent import Recent
from fastkd.models import create_model
from fastkd.training.config import Config, Settings
from fastkd.training.run_summary import describe

F64 = torch.float64


def unit(n, width, seed):
    x = torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return x / x.square().sum(1, keepdim=True).sqrt()


def by_hand(student, teacher, queues, temperature, weight, normalizers=(0, 0)):
    """Score by score. Without queues the negatives are the other images; what is scored is a constant."""
    n, total, found = len(student), 0, []
    for x, other, queue, given in (
        (student, teacher.detach(), queues[1], normalizers[0]),
        (teacher, student.detach(), queues[0], normalizers[1]),
    ):
        others = [queue if len(queue) else other[torch.arange(n) != i] for i in range(n)]
        size, k = n + len(queue), len(others[0])
        odds = [torch.exp(torch.cat([other[i : i + 1], others[i]]) @ x[i] / temperature) for i in range(n)]
        z = given or torch.stack(odds).mean().item() * size
        for row in odds:
            p = row / z
            total = total - (p[0] / (p[0] + k / size + 1e-7)).log()
            total = total - (k / size / (p[1:] + k / size + 1e-7)).log().sum()
        found.append(z)
    return weight * total / n, torch.tensor(found, dtype=F64)


@pytest.mark.parametrize("length", [0, 1, 5, 20])
@pytest.mark.parametrize("seed", range(4))
def test_values_and_gradients_by_hand(length, seed):
    torch.manual_seed(seed)
    n, width, temperature = (2, 3, 5, 8)[seed], (1, 2, 5, 16)[seed], (0.07, 0.1, 0.5, 1.0)[seed]
    module = Recent(length, width, temperature, 0.8).double()
    sides = [unit(n, width, 10 * seed + i).requires_grad_() for i in (0, 1)]
    for normalizers in ((0, 0), (30.0, 0), (5.0, 7.0)):
        module.normalizers.copy_(torch.tensor(normalizers))
        queues = module.student_queue, module.teacher_queue
        loss, found = module(*sides)
        wanted, exact = by_hand(*sides, queues, temperature, 0.8, normalizers)
        torch.testing.assert_close(loss, wanted, rtol=1e-9, atol=0)
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=0)
        grads = [torch.autograd.grad(x, sides) for x in (loss, wanted)]
        torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-11)


def test_a_queue_replaces_its_oldest_rows():
    module = Recent(5, 2, 0.1, 1.0).double()
    first = module.student_queue.clone()
    assert torch.allclose(first.norm(dim=1), torch.ones(5, dtype=F64)) and not torch.equal(
        first, module.teacher_queue
    )
    rows = torch.arange(40, dtype=F64).view(20, 2)
    z = torch.tensor([3.0, 4.0], dtype=F64)
    module.update(rows[:3], rows[:3] + 100, z)
    assert torch.equal(module.student_queue, torch.cat([rows[:3], first[3:]]))
    module.update(rows[3:7], rows[3:7] + 100, 2 * z)  # over the end
    assert torch.equal(module.student_queue, torch.cat([rows[5:7], rows[2:5]]))
    assert torch.equal(module.teacher_queue, module.student_queue + 100)
    module.update(rows[7:20], rows[7:20] + 100, z)  # more than it holds: the latest
    assert {*map(float, module.student_queue[:, 0])} == {*map(float, rows[15:20, 0])}
    assert torch.equal(module.normalizers, z)  # of the first batch, for ever
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    other = Recent(5, 2, 0.1, 1.0).double()
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    for each in (module, other):
        each.update(rows[:1], rows[:1], z)
    assert torch.equal(module.student_queue, other.student_queue) and module.place == other.place


@pytest.mark.parametrize("negatives", ["queue", "batch"])
def test_the_method_needs_neither_labels_nor_index(negatives):
    torch.manual_seed(0)
    networks = create_model("resnet8", 7), create_model("resnet8x4", 7)
    options = {"crd": {"negatives": negatives, **({"queue": 24} if negatives == "queue" else {})}}
    distillation = fastkd.Distillation(*networks, "crd", options=options)
    method, images = distillation.methods["crd"], torch.randn(8, 3, 32, 32)
    assert method.settled == {} and method.recent.length == (24 if negatives == "queue" else 0)
    for _ in range(3):
        losses = distillation(images)
        distillation.zero_grad()
        losses.total.backward()
        assert all(layer.weight.grad.any() for layer in method.embeddings)
        assert networks[0].conv1.weight.grad.any() and losses.total.isfinite()
        distillation.update(None, losses.records)
    assert (method.recent.normalizers > 0).all()
    record = losses.records["crd"][0]
    if negatives == "queue":
        assert torch.equal(method.recent.student_queue[16:], record) and method.recent.place == 0
    torch._dynamo.reset()
    compiled = torch.compile(distillation, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images).total, distillation(images).total, rtol=1e-3, atol=1e-3)


def test_what_cannot_be_is_one_line():
    for words, text in (
        (["negatives=queue", "k=5"], "option crd: k is 5, but nothing is drawn with negatives=queue"),
        (["negatives=batch", "positive=relax"], "option crd: positive is relax, but nothing is drawn with"),
        (["negatives=none"], "option crd.negatives is 'none', wanted one of bank, queue, batch"),
        (["queue=0"], "option crd: queue is 0, wanted at least 1"),
    ):
        with pytest.raises(ValueError, match=text) as caught:
            define("crd", words=words)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="images has 1 of them, wanted at least 2"):
        Recent(0, 2, 0.1, 1.0)(torch.ones(1, 2), torch.ones(1, 2))
    with pytest.raises(ValueError, match="train_labels is None.*but with negatives=queue or negatives=batch"):
        fastkd.Distillation(create_model("resnet8"), create_model("resnet8"), "crd")


def test_a_run_says_before_it_trains_what_it_keeps(tmp_path):
    pytest.importorskip("sklearn")
    images, sizes = 1437, {}
    for words in ((), ("crd.queue=5000", "crd.negatives=queue"), ("crd.negatives=batch",)):
        settings = Settings(
            "crd", "digits", teacher="resnet8", student="resnet8", options=words, output=tmp_path
        )
        lines = [line for line in describe(Config(settings)).splitlines() if line.startswith("memory")]
        sizes[len(words)] = [
            float(line.removeprefix("memory   CRD keeps ").removesuffix(" MB")) for line in lines
        ]
    assert sizes[1] == [] and sizes[2] == [round(2 * 5000 * 128 * 4 / 1e6, 1)]
    assert sizes[0][0] > 2 * images * 128 * 4 / 1e6  # and what the drawing needs
