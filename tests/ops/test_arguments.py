"""How losses and their modules are called: collections of features, signatures, and warnings that point at
the user's line.
"""

from __future__ import annotations

import inspect
import warnings
from collections import OrderedDict

import pytest
import torch
from child_process import python
from support import cpp_missing, values

import fastkd
from fastkd import errors, reference

pytestmark = pytest.mark.usefixtures("one_thread")
F32 = torch.float32
BACKENDS = [
    "reference",
    pytest.param(
        "cpp", marks=pytest.mark.skipif(bool(cpp_missing()), reason=f"backend cpp: {cpp_missing()}")
    ),
]
MODULES = [
    (fastkd.AttentionTransfer, fastkd.attention_transfer_loss),
    (fastkd.FSP, fastkd.fsp_loss),
    (fastkd.KD, fastkd.kd_loss),
    (fastkd.HCL, fastkd.hcl_loss),
]
COLLECTIONS = {
    "tuple": tuple,
    "generator": lambda features: (x for x in features),
    "dict": lambda features: {f"layer{i}": x for i, x in enumerate(features)},
    "ordered dict": lambda features: OrderedDict((str(9 - i), x) for i, x in enumerate(features)),
    "values of a dict": lambda features: dict(enumerate(features)).values(),
}


@pytest.mark.parametrize("collection", COLLECTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["attention_transfer_loss", "fsp_loss"])
def test_features_are_taken_in_the_order_of_their_collection(name, backend, collection):
    s, t = ([values((2, c, 4, 4), F32) for c in (3, 5, 4)] for _ in range(2))
    make, weights = COLLECTIONS[collection], [1.0, 2.0, 4.0][: 3 if name == "attention_transfer_loss" else 2]
    for module in (fastkd, reference):
        loss = getattr(module, name)
        with fastkd.use_backend(backend):
            assert torch.equal(loss(make(s), make(t), weights=weights), loss(s, t, weights=weights))
            # a generator is explained too
            with pytest.raises((TypeError, ValueError), match=r"student\[1\]"):
                loss(make([s[0], s[1][:1], s[2]]), make(t))


def test_a_compiled_loss_takes_a_dict():
    s, t = ([values((2, c, 4, 4), F32) for c in (3, 5)] for _ in range(2))
    compiled = torch.compile(
        lambda s, t: fastkd.attention_transfer_loss(s, t), fullgraph=True, backend="aot_eager"
    )
    keys = ("layer1", "layer2")
    torch.testing.assert_close(
        compiled(dict(zip(keys, s)), dict(zip(keys, t))), fastkd.attention_transfer_loss(s, t)
    )


@pytest.mark.parametrize("module, function", MODULES)
def test_a_module_takes_what_follows_student_and_teacher_in_the_functions_order(module, function):
    ours = list(inspect.signature(module).parameters.values())
    wanted = list(inspect.signature(function).parameters.values())[2:]
    wanted = [p for p in wanted if p.name != "mask"]  # which belongs to a batch: forward takes it
    assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in wanted]


def test_a_module_takes_its_first_argument_by_position():
    assert fastkd.KD(2.5).temperature == 2.5 and fastkd.AttentionTransfer(3.0).p == 3.0
    with pytest.raises(TypeError, match="positional"):
        fastkd.FSP("max")


def test_fsp_is_found_under_its_former_name_too():
    from fastkd.ops import fsp, gram

    for name in ("FSPLossFunction", "FSPMatrixFunction", "fsp_loss", "fsp_matrix"):
        assert getattr(gram, name) is getattr(fsp, name)


def warned(call) -> list[warnings.WarningMessage]:
    errors._said.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
        call()
    return caught


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options, sizes",
    [
        ({}, [(4, 1), (4, 4)]),
        ({}, [(1, 4), (4, 4)]),
        ({"pool": "after"}, [(4, 1), (4, 4)]),
        ({"teacher_is_map": True}, [(1, 1), (4, 4)]),
    ],
)
def test_a_stage_of_one_position_is_named_once(backend, options, sizes):
    student = [
        values((2, 3, 4, 4), F32).requires_grad_(),
        values((2, 3, sizes[0][0], sizes[0][0]), F32).requires_grad_(),
    ]
    teacher = [values((2, 5, 4, 4), F32), values((2, 5, sizes[0][1], sizes[0][1]), F32)]
    if options.get("teacher_is_map"):
        teacher = [fastkd.attention_map(x) for x in teacher]
    with fastkd.use_backend(backend):
        caught = warned(lambda: fastkd.attention_transfer_loss(student, teacher, **options))
    assert len(caught) == 1 and caught[0].filename == __file__
    message = str(caught[0].message)
    assert (
        "student[1]" in message
        and "one position" in message
        and "student[0]" not in message
        and "\n" not in message
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pool", ["before", "after"])
def test_stages_of_several_positions_are_not_warned_of(backend, pool):
    student, teacher = (
        [values((2, 3, *size), F32).requires_grad_() for size in ((1, 2), (2, 1))] for _ in range(2)
    )
    with fastkd.use_backend(backend):
        assert not warned(lambda: fastkd.attention_transfer_loss(student, teacher, pool=pool))
        assert not warned(
            lambda: fastkd.attention_transfer_loss(
                student[0][:, :, :, :1].detach(), teacher[0].detach(), pool=pool
            )
        )


def test_warnings_point_at_the_users_line_through_modules():
    x, y = values((2, 3, 1, 1), F32).requires_grad_(), values((2, 3, 1, 1), F32)
    network = torch.nn.ModuleDict({"loss": fastkd.AttentionTransfer()})
    (caught,) = warned(lambda: network["loss"](x, y))
    assert caught.filename == __file__


IMPORTED_TWICE = """
import sys, torch
def run():
    import fastkd
    x, y = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4)
    def loss(x, y):
        return fastkd.attention_transfer_loss(x, y)
    (want,) = torch.autograd.grad(fastkd.reference.attention_transfer_loss(x, y), x)
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        with fastkd.use_backend("cpp" if fastkd.native.CPU.available else "auto"):
            (grad,) = torch.autograd.grad(function(x, y), x)
        torch.testing.assert_close(grad, want)
run()
for name in [name for name in sys.modules if name.split(".")[0] == "fastkd"]:
    del sys.modules[name]
run()
"""


def test_fastkd_can_be_imported_twice_in_a_process():
    done = python(IMPORTED_TWICE)
    assert done.returncode == 0, done.stderr


TOKENS = {  # shape, layout -> whether they are warned of
    "tokens": ((2, 16, 64), False, True),
    "tokens and a class token": ((2, 197, 192), False, True),
    "no square": ((2, 18, 64), False, False),
    "two class tokens": ((2, 18, 64), False, False),
    "few": ((2, 9, 64), False, False),
    "narrow": ((2, 16, 63), False, False),
    "a view of them with channels first": ((2, 16, 64), True, False),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", ["attention_transfer_loss", "fsp_loss", "ofd_loss"])
@pytest.mark.parametrize("case", TOKENS)
def test_what_looks_like_tokens_is_told_once(backend, loss, case):
    shape, view, told = TOKENS[case]
    n, rows, columns = shape

    def features(learns):
        x = values((n, columns, rows) if view else shape, F32)
        return (x.mT if view else x).requires_grad_(learns)

    student, teacher = ([features(learns) for _ in range(2)] for learns in (True, False))
    rest = [[torch.zeros(rows)] * 2] if loss == "ofd_loss" else []
    with fastkd.use_backend(backend):
        caught = warned(lambda: getattr(fastkd, loss)(student, teacher, *rest))
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == told
    if told:
        assert f"{loss}: student[0] is {shape}" in messages[0] and "fastkd.tokens_to_map" in messages[0]
        assert caught[0].filename == __file__ and "\n" not in messages[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_maps_of_a_teacher_are_no_tokens(backend):
    """A stage of three dimensions beside one of four, whose teacher's map has three."""
    student = [values((2, 3, *size), F32).requires_grad_() for size in ((64,), (16, 64))]
    maps = [fastkd.attention_map(values(tuple(x.shape), F32)) for x in student]
    assert maps[1].shape == (2, 16, 64)
    with fastkd.use_backend(backend):
        assert not warned(lambda: fastkd.attention_transfer_loss(student, maps, teacher_is_map=True))
