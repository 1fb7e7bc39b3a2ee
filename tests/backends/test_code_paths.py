"""Every code path of the C++ kernels, forced: right answers, the same bits, NaN where eager has NaN."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from child_process import python
from support import (
    DTYPES,
    KERNELS,
    LAYOUTS,
    arrange,
    check,
    check_loss,
    cpp_missing,
    evaluate,
    make,
    missing,
    name,
    place,
    ref,
    some_shape,
    values,
)

import fastkd
from fastkd import native

pytestmark = pytest.mark.usefixtures("one_thread")
PATHS = [] if cpp_missing() else native.cpu_paths()
WAYS = [*PATHS, *(["avx512 without AMX"] if PATHS and native.amx() else [])]


@pytest.fixture(
    params=WAYS or [pytest.param("none", marks=pytest.mark.skip(reason=f"backend cpp: {cpp_missing()}"))]
)
def path(request):
    before, amx = native.cpu_path(), native.amx()
    path = request.param.split()[0]
    native.set_cpu_path(path)
    native.set_amx(amx and request.param == path)
    yield path
    native.set_cpu_path(before)
    native.set_amx(amx)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_every_code_path_matches_the_reference(path, dtype, layout):
    assert native.cpu_path() == path
    shape = some_shape()
    x, t = make(shape, dtype, layout), make(shape, random.choice(DTYPES))
    check("cpp", fastkd.attention_map, ref.attention_map, [x], upstream=torch.randn(shape[0], *shape[2:]))
    terms = ref.fsp_matrix(x.abs().double(), t.abs().double()).max().item()
    check(
        "cpp",
        fastkd.fsp_matrix,
        ref.fsp_matrix,
        [x, t],
        upstream=torch.randn(shape[0], shape[1], shape[1]),
        output_terms=terms,
    )
    stages = [
        [make((2, c, *size), d, layout) for c, size in ((16, (11, 7)), (33, (11, 7)), (64, (4, 4)))]
        for d in (dtype, random.choice(DTYPES))
    ]
    check_loss("cpp", "attention_transfer_loss", *stages, p=random.choice((2, 3, 1.5)))
    check_loss("cpp", "fsp_loss", *stages, distance=random.choice(("squared", "frobenius", "column_l2")))


@pytest.mark.parametrize("pool, pool_mode", list(itertools.product(["before", "after"], ["avg", "max"])))
def test_every_code_path_pools_as_the_reference(path, pool, pool_mode):
    layout = random.choice(LAYOUTS)
    s, t = (
        [make((2, 17, 9, 10), torch.bfloat16, layout), make((2, 9, 5, 5))],
        [make((2, 17, 4, 10)), make((2, 9, 7, 7))],
    )
    check_loss("cpp", "attention_transfer_loss", s, t, pool=pool, pool_mode=pool_mode)
    check_loss("cpp", "fsp_loss", s, t, pool_mode=pool_mode)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name)
def test_every_code_path_converts_every_half_number_exactly(path, dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = bits.view(1, -1, 64)
    with fastkd.use_backend("cpp"):
        power_sums = fastkd.attention_map(x.transpose(0, 1).contiguous(), p=1, normalize=False)
    torch.testing.assert_close(power_sums.view(-1), x.float().abs().view(-1), rtol=0, atol=0, equal_nan=True)


def test_environment_forces_a_code_path(cpp):
    # a process of its own each: the slowest path is never the one chosen unasked, where there is another
    for path in PATHS[:1]:
        assert (
            python("from fastkd import native; print(native.cpu_path())", FASTKD_CPU=path).stdout.strip()
            == path
        )
    wrong = python("import fastkd", FASTKD_CPU="sse9")
    assert wrong.returncode != 0 and all(word in wrong.stderr for word in ("sse9", *native.CPU_PATHS))


def test_amx_is_a_part_of_one_code_path_and_can_be_switched_off(cpp):
    code = (
        "import sys; from fastkd import native; print(native.cpu_path(), native.amx(),"
        " native.report()['cpu']['amx'])"
    )
    assert python(code, FASTKD_AMX="0").stdout.split()[1:] == ["False", "False"]
    if native.amx():
        for path in PATHS:
            here = str(path == "avx512")
            assert python(code, FASTKD_CPU=path).stdout.split() == [path, here, here]
    refused = python(code, FASTKD_AMX="1", FASTKD_CPU="portable")
    assert refused.returncode != 0 and all(word in refused.stderr for word in ("FASTKD_AMX", "portable"))
    wrong = python(code, FASTKD_AMX="yes")
    assert wrong.returncode != 0 and "FASTKD_AMX is 'yes'" in wrong.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
def test_every_way_through_memory_gives_the_same_bits(path, memory_plan, dtype):
    # more than 1 MiB each, where the plan counts: planes of whole cache lines, in pairs and with one left
    # over, with gaps between them, and of numbers that fill no line
    shapes = (3, 60, 64, 48), (3, 64, 3072), (3, 61, 64, 48), (3, 2201, 9, 9)
    students, teachers = ([make(shape, dtype) for shape in shapes] for _ in range(2))
    for features in (students, teachers):
        features[1] = features[1][..., :2867]
    students = [x.detach().requires_grad_() for x in students]
    found = {}
    for plan in native.MEMORY_PLANS:
        memory_plan(plan)
        assert native.memory_plan() == plan == native.report()["cpu"]["memory"]
        loss = fastkd.attention_transfer_loss(students, teachers)
        found[plan] = [loss, *torch.autograd.grad(loss, students)]
    first = next(iter(found.values()))
    assert all(torch.equal(a, b) for other in found.values() for a, b in zip(first, other))
    check_loss("cpp", "attention_transfer_loss", [x.detach() for x in students], teachers)


def test_environment_forces_a_way_through_memory(memory_plan):
    code = "import fastkd; from fastkd import native; print(native.memory_plan())"
    assert python(code, FASTKD_MEMORY="cached").stdout.strip() == "cached"
    wrong = python("import fastkd", FASTKD_MEMORY="no")
    assert wrong.returncode != 0 and "FASTKD_MEMORY is 'no', wanted one of" in wrong.stderr
    with pytest.raises(ValueError, match="memory plan is 'fast', wanted one of"):
        memory_plan("fast")
    memory_plan(None)  # measured again
    assert native.memory_plan() in native.MEMORY_PLANS


@pytest.fixture
def ahead_plan(cpp):
    """``native.set_ahead_plan``; the plan before comes back."""
    before = native.ahead_plan()
    yield native.set_ahead_plan
    native.set_ahead_plan(before)


def test_environment_forces_when_maps_are_asked_for(ahead_plan):
    code = "import fastkd; from fastkd import native; print(native.ahead_plan())"
    for plan in native.AHEAD_PLANS:
        assert python(code, FASTKD_AHEAD=plan).stdout.strip() == plan
    assert python(code, FASTKD_AHEAD=None).stdout.strip() == "fitting"
    wrong = python("import fastkd", FASTKD_AHEAD="no")
    assert wrong.returncode != 0 and "FASTKD_AHEAD is 'no', wanted one of" in wrong.stderr
    with pytest.raises(ValueError, match="ahead plan is 'fast', wanted one of"):
        ahead_plan("fast")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_maps_asked_for_ahead_change_no_bit(path, ahead_plan, layout, dtype, set_threads):
    set_threads(1)  # so that a thread has a sample to ask for
    # averaged and not; products along positions, over channels of positions and (the last pair) over channels
    shapes = (3, 17, 12, 12), (3, 33, 6, 6), (3, 20, 6, 6), (3, 96, 2, 2), (3, 96, 2, 2)
    students, teachers = ([make(shape, dtype, layout) for shape in shapes] for _ in range(2))
    for features in (students, teachers):
        features[2] = make((3, 160, 6, 6), dtype, layout)[:, ::8]  # with gaps, which nobody asks for
    students = [x.detach().requires_grad_() for x in students]
    found = {}
    for plan in native.AHEAD_PLANS:
        ahead_plan(plan)
        assert native.ahead_plan() == plan == native.report()["cpu"]["ahead"]
        loss = fastkd.fsp_loss(students, teachers)
        found[plan] = [loss, *torch.autograd.grad(loss, students)]
    first = next(iter(found.values()))
    assert all(torch.equal(a, b) for other in found.values() for a, b in zip(first, other))


HALF = (33, 14), (64, 14), (17, 7)


def workload():
    s = [
        make((5, c, n, n), dtype, random.choice(LAYOUTS))
        for c, n, dtype in ((16, 31, torch.float32), (33, 16, torch.bfloat16), (64, 7, torch.float16))
    ]
    t = [torch.randn_like(x) for x in s]
    half = [
        make((5, c, n, n), torch.bfloat16, layout)
        for layout in random.sample(("contiguous", "channels_last"), 2)
        for c, n in HALF
    ]
    return [
        lambda: evaluate(lambda *x: fastkd.attention_transfer_loss(x[:3], x[3:], 3.0), [*s, *t]),
        lambda: evaluate(lambda *x: fastkd.fsp_loss(x[:3], x[3:]), [*s, *t]),
        lambda: evaluate(lambda *x: fastkd.fsp_loss(x[:3], x[3:]), half),
        lambda: evaluate(fastkd.attention_map, [s[0]], upstream=torch.ones(5, 31, 31)),
        lambda: evaluate(fastkd.fsp_matrix, s[:2], upstream=torch.ones(5, 16, 33)),
    ]


def bits(result):
    return [x.detach().clone() for x in (result.output, *result.grads)]


def test_results_are_the_same_bits_in_each_run_and_with_any_thread_count(path):
    threads = torch.get_num_threads()
    with fastkd.use_backend("cpp"):
        for work in workload():
            first = bits(work())
            try:
                for count in (1, 2, 3, threads):
                    torch.set_num_threads(count)
                    assert all(torch.equal(a, b) for a, b in zip(first, bits(work())))
            finally:
                torch.set_num_threads(threads)


SPECIAL = {
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "overflows when squared": 1e25,
    "norm overflows": 1e15,
    "underflows when squared": 1e-30,
}


@pytest.mark.parametrize("where", ["one element", "one sample", "everywhere"])
@pytest.mark.parametrize("value", SPECIAL)
def test_nan_and_infinity_come_out_where_eager_has_them(path, value, where):
    nan_where_eager_has_it("cpp", value, where)


@pytest.mark.parametrize("backend", KERNELS[1:2])
@pytest.mark.parametrize("where", ["one element", "one sample", "everywhere"])
@pytest.mark.parametrize("value", SPECIAL)
def test_triton_has_nan_and_infinity_where_eager_has_them(backend, value, where):
    nan_where_eager_has_it(backend, value, where)


def nan_where_eager_has_it(backend, value, where):
    for eps_mode, p in itertools.product(("clamp", "add"), (2, 1, 3)):
        dtype, layout = (
            random.choice((torch.float32, torch.bfloat16)),
            random.choice(("contiguous", "channels_last", "stepped")),
        )
        x, t = values((3, 17, 5, 7), dtype), values((3, 17, 5, 7), dtype)
        x[{"one element": (1, 2, 3, 4), "one sample": (1,), "everywhere": ()}[where]] = SPECIAL[value]
        tensors = [arrange(x, layout), t]
        for ours, eager in (
            (
                lambda x, t: fastkd.attention_transfer_loss(x, t, p, eps_mode=eps_mode),
                lambda x, t: ref.attention_transfer_loss(x, t, p, eps_mode=eps_mode),
            ),
            (
                lambda x, t: fastkd.attention_map(x, p, eps_mode=eps_mode).sum() + 0 * t.sum(),
                lambda x, t: ref.attention_map(x, p, eps_mode=eps_mode).sum() + 0 * t.sum(),
            ),
            (lambda x, t: fastkd.fsp_loss([x, x], [t, t]), lambda x, t: ref.fsp_loss([x, x], [t, t])),
        )[: 3 if backend == "cpp" else 2]:
            with fastkd.use_backend(backend):
                got = [x.cpu() for x in bits(evaluate(ours, [place(x, backend) for x in tensors]))]
            want = bits(evaluate(eager, [y.float() for y in tensors]))
            for a, b in zip(got, want):
                missed = b.isnan() & ~a.isnan()
                assert not missed.any(), (
                    f"eager has NaN at {missed.nonzero()[0].tolist()}, ours {a[missed][0].item()}"
                )
                assert not (a.isnan() & b.isfinite()).any(), "NaN where eager is finite"


def test_a_backend_whose_first_kernel_fails_leaves_the_others_their_tests(monkeypatch, capsys):
    def failing(x):
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr(fastkd, "attention_map", failing)
    assert missing.__wrapped__("reference") == "" and "no kernel image" in capsys.readouterr().err
