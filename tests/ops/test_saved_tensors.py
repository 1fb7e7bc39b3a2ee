"""What the operations keep for the backward pass, under checkpointing, offloading and changes in place."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from support import KERNELS, place, ref, values
from torch.utils.checkpoint import checkpoint

import fastkd
from fastkd import native
from fastkd.models import create_model
from fastkd.ops import attention, fsp
from fastkd.ops._grad_prefetch import GradPrefetch

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPES = ((2, 3, 4, 3), (2, 4, 4, 3), (2, 5, 2, 2))
TEACHER = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(SHAPES)]
BANKS = [F.normalize(torch.randn(4, 36, generator=torch.Generator().manual_seed(i))) for i in range(2)]

# name -> (module with the functions, student's stages, teacher's stages) -> scalar
OPERATIONS = {
    "attention_map": lambda m, s, t: sum((m.attention_map(x) * x.mean(1).detach()).sum() for x in s),
    "attention_transfer_loss": lambda m, s, t: m.attention_transfer_loss(s, t, weight=100.0),
    "attention_transfer_loss, three times": (
        lambda m, s, t: 3 * m.attention_transfer_loss(s, t, p=1, pool="after")
    ),
    "attention_transfer_loss over maps": lambda m, s, t: m.attention_transfer_loss(
        m.attention_map(s[0]), t[0], student_is_map=True, difference="l2"
    ),
    "fsp_matrix": lambda m, s, t: m.fsp_matrix(s[0], s[1]).square().sum() + m.fsp_matrix(s[1], s[2]).sum(),
    "fsp_loss": lambda m, s, t: m.fsp_loss(s, t),
    "fsp_loss, three times": lambda m, s, t: 3 * m.fsp_loss(s[:2], t[:2], distance="column_l2"),
    "tap": lambda m, s, t: sum(
        (y.sin().sum() + 5 * a.square().sum(1).max()) for y, a in (m.tap(x * 1) for x in s)
    ),
    "relu_tap": lambda m, s, t: sum(
        (y.square().sum() + a[0].sum()) for y, a in (m.relu_tap(x, x.flip(0)) for x in s)
    ),
    "kd_loss": lambda m, s, t: m.kd_loss(s[0].mean((2, 3)), t[0].mean((2, 3))),
    "dkd_loss": lambda m, s, t: m.dkd_loss(s[0].mean((2, 3)), t[0].mean((2, 3)), torch.tensor([2, 0])),
    "hcl_loss": lambda m, s, t: 3 * m.hcl_loss(s, t),
    "ofd_loss": lambda m, s, t: 3 * m.ofd_loss(s, t, [-0.3 * torch.ones(x.shape[1]) for x in s]),
    "sakd_loss": lambda m, s, t: m.sakd_loss(s[2], t[2]),
    "rkd_loss": lambda m, s, t: m.rkd_loss(s[0].reshape(8, 9), t[0].reshape(8, 9)),
    "crd_loss": lambda m, s, t: m.crd_loss(
        *(F.normalize(x[0].flatten(1)) for x in (s, t)), *BANKS, torch.tensor([[0, 2, 3], [1, 3, 2]])
    )[0],
}
# interpreted or emulated: slow
ON_GPUS = ("attention_map", "attention_transfer_loss", "fsp_matrix", "fsp_loss", "tap", "relu_tap")
CASES = [
    pytest.param(backend.values[0], operation, marks=backend.marks, id=f"{backend.id}-{operation}")
    for backend, operations in zip(KERNELS, (OPERATIONS, ON_GPUS, ON_GPUS), strict=True)
    for operation in operations
]


def student(backend: str) -> list[torch.Tensor]:
    return [place(values(shape, torch.float32), backend).requires_grad_() for shape in SHAPES]


def run(backend, operation, inside):
    """The loss and its gradients, ``inside(function, *student)`` deciding how the function is called."""
    torch.manual_seed(5)
    s, t = student(backend), [place(x, backend) for x in TEACHER]
    with fastkd.use_backend(backend):
        loss = inside(lambda *s: OPERATIONS[operation](fastkd, list(s), t), *s)
        loss.backward()
    return loss.detach(), [x.grad for x in s]


def plainly(function, *s):
    return function(*s)


def hooked(pack, unpack):
    def inside(function, *s):
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return function(*s)

    return inside


def offloaded(function, *s):
    with torch.autograd.graph.save_on_cpu():
        return function(*s)


WAYS = {
    "checkpoint": lambda function, *s: checkpoint(function, *s, use_reentrant=False),
    "reentrant checkpoint": lambda function, *s: checkpoint(lambda *s: function(*s), *s, use_reentrant=True),
    "nested checkpoint": lambda function, *s: checkpoint(
        lambda *s: checkpoint(function, *s, use_reentrant=False), *s, use_reentrant=False
    ),
    "save_on_cpu": offloaded,
}


@pytest.mark.parametrize("backend, operation", CASES)
def test_checkpointing_and_offloading_change_nothing(backend, operation):
    want = run(backend, operation, plainly)
    for way, inside in WAYS.items():
        if backend == "triton" and way != "checkpoint":
            continue
        got = run(backend, operation, inside)
        assert torch.equal(got[0], want[0]), way
        for found, wanted in zip(got[1], want[1], strict=True):
            assert torch.equal(found, wanted) if wanted is not None else found is None, way


@pytest.mark.parametrize("backend, operation", CASES)
def test_what_is_saved_is_unpacked_once(backend, operation):
    times: list[int] = []

    def pack(x):
        times.append(0)
        return len(times) - 1, x

    def unpack(packed):
        times[packed[0]] += 1
        return packed[1]

    run(backend, operation, hooked(pack, unpack))
    assert times and set(times) == {1}, times


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_network_trains_as_without(use_reentrant):
    """The fused batch norms and the loss, in one region that is run twice; statistics are counted twice, as
    PyTorch's are.
    """
    images = torch.randn(4, 3, 16, 16).to(memory_format=torch.channels_last).requires_grad_()
    model = create_model("resnet8").to(memory_format=torch.channels_last)
    teacher = [x.detach() * 2 for x in copy.deepcopy(model)(images, features=True)[0].stages]

    def loss(model, x):
        features, logits = model(x, features=True)
        return (
            logits.square().mean()
            + fastkd.attention_transfer_loss(features.stages, teacher, weight=50.0)
            + fastkd.fsp_loss(features.stages, teacher)
        )

    found = []
    for again in (False, True):
        twin = copy.deepcopy(model)
        total = (
            checkpoint(lambda x, twin=twin: loss(twin, x), images, use_reentrant=use_reentrant)
            if again
            else loss(twin, images)
        )
        total.backward()
        found.append([x.grad for x in twin.parameters()])
    assert all(map(torch.equal, *found))


LOSSES = {"attention_transfer_loss": attention, "fsp_loss": fsp}


@pytest.mark.skipif(not native.CPU.available, reason="needs the CPU library")
@pytest.mark.parametrize("way", ["checkpoint", "save_on_cpu"])
@pytest.mark.parametrize("function", LOSSES)
def test_no_gradient_is_held_for_who_checkpoints(function, way):
    """Between forward and backward pass nothing of a feature's size is saved but the features."""
    s, t = [
        [x.detach().requires_grad_(need) for x in (values((2, 64, 9, 9), torch.float32),) * 3]
        for need in (True, False)
    ]
    with fastkd.use_backend("cpp"):
        loss = WAYS[way](lambda *s: getattr(fastkd, function)(list(s), t), *s)
        node = loss.grad_fn
        assert not node.prepared
        loss.backward()


@pytest.mark.skipif(not native.CPU.available, reason="needs the CPU library")
@pytest.mark.parametrize("with_teacher", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("foreseen", [True, False])
@pytest.mark.parametrize("function", LOSSES)
def test_a_feature_changed_in_place_raises_whether_or_not_the_gradient_was_foreseen(
    function, foreseen, stage, with_teacher, monkeypatch
):
    monkeypatch.setattr(LOSSES[function], "_prefetch", GradPrefetch())
    s = [x * 1 for x in student("cpp")]
    t = [x.clone().requires_grad_(with_teacher) for x in TEACHER]
    with fastkd.use_backend("cpp"):
        loss = getattr(fastkd, function)(s, t)
        s[stage].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (loss if foreseen else 3 * loss).backward()


@pytest.mark.parametrize("function", LOSSES)
def test_a_teacher_without_gradient_may_be_changed_as_with_the_reference(function):
    for module in (fastkd, ref):
        s, t = [x * 1 for x in student("cpp")], [x.clone() for x in TEACHER]
        loss = getattr(module, function)(s, t)
        t[1].add_(1)
        loss.backward()
