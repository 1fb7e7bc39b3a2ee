"""The goals for the kernels. On a CPU, unless said otherwise: float32, all threads, wall time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

BACKEND = "cpp"
BMM = "torch.bmm of the products"
CIFAR = ("resnet20-64", "resnet20-128", "wrn40_2-128", "resnet32x4-64")
GPU_CHAINS, GPU_LARGE = ("resnet20-128", "wrn40_2-128", "resnet32x4-128"), ("resnet50-64",)

Record = dict[str, Any]


def time_of(record: Record, row: str) -> float | None:
    return record["rows"].get(row, {}).get("milliseconds")


def _ratio(above: str, below: str) -> Callable[[Record], float | None]:
    """The time of one row over that of another."""

    def value(record: Record) -> float | None:
        a, b = time_of(record, above), time_of(record, below)
        return a / b if a and b else None

    return value


def _fact(name: str, row: str = BACKEND) -> Callable[[Record], float | None]:
    return lambda record: record["rows"].get(row, {}).get(name)


def _memory(record: Record) -> float | None:
    extra = _fact("extra_memory")(record)
    return None if extra is None else max(extra, 1) / record["memory_unit"]


def _above_relu(record: Record) -> float | None:
    ours, relu = time_of(record, BACKEND), time_of(record, "torch.relu")
    return max(1e3 * (ours - relu), 1e-3) if ours and relu else None


@dataclass(frozen=True)
class Goal:
    """A bound on the geometric mean, over some records, of a value of each; ``at_least`` or else at most.
    ``against`` pairs records.
    """

    title: str
    bound: float
    at_least: bool
    value: Callable[[Record], float | None]
    where: dict[str, tuple[Any, ...]]
    # the other record of a pair differs in these; the value is the ratio of the backend's times
    against: dict[str, Any] | None = None
    unit: str = ""
    clock: str = "wall"  # "process": of one thread; a GPU also has "graph" and "cold" (gpu.py)
    device: str = "cpu"


PLAIN: dict[str, tuple[Any, ...]] = {
    "dtype": ("float32",),
    "layout": ("nchw",),
    "direction": ("forward+backward",),
    "upstream": (1,),
}
EAGER, COMPILED, FLOOR = (
    _ratio("eager", BACKEND),
    _ratio("torch.compile", BACKEND),
    _ratio(BACKEND, "streaming floor"),
)
SAME = _ratio(BACKEND, BACKEND)


def _losses(operation: str, *shapes: str, **other: tuple[Any, ...]) -> dict[str, tuple[Any, ...]]:
    return {**PLAIN, "operation": (operation,), "shape": shapes, **other}


def _goals() -> Iterator[Goal]:
    at, scaled = _losses("attention", *CIFAR), _losses("attention", *CIFAR, upstream=(1000,))
    at128 = _losses("attention", "resnet20-128", "wrn40_2-128")
    big = _losses("attention", "resnet50-8")
    small, wide, r20 = _losses("fsp", *CIFAR[:2]), _losses("fsp", *CIFAR[2:]), _losses("fsp", "resnet20-64")
    for name, where, eager, compiled, floor in (
        ("AT, CIFAR chains", at, 7, 2.2, None),
        ("AT, CIFAR chains at batch 128", at128, None, None, 1.5),
        ("AT, CIFAR chains, upstream 1000", scaled, 4.5, 1.6, None),
        ("AT, ResNet-50 stages", big, 5.5, 2.5, 1.25),
        ("FSP, ResNet-20", small, 7, 3.5, None),
        ("FSP, WRN and ResNet-32x4", wide, 4.5, 2.9, None),
    ):
        # AT is bound by memory, which one thread in process time shows best
        for clock, note in (("wall", ""), ("process", ", 1 thread")) if "AT" in name else (("wall", ""),):
            title = name + note
            if eager and compiled:
                yield Goal(f"{title}: eager ÷ {BACKEND}", eager, True, EAGER, where, clock=clock)
                over = f"{title}: torch.compile ÷ {BACKEND}"
                yield Goal(over, compiled, True, COMPILED, where, clock=clock)
            if floor:
                yield Goal(f"{title}: {BACKEND} ÷ plain add", floor, False, FLOOR, where, clock=clock)
        if "FSP" in name:
            yield Goal(f"{name}: share of torch.mm's rate", 0.6, True, _fact("of_mm_rate"), where)
    every = _losses("fsp", *CIFAR, "resnet50-8")
    yield Goal(f"FSP: its products by torch.bmm ÷ {BACKEND}", 1.25, True, _ratio(BMM, BACKEND), every)
    yield Goal(f"FSP: eager broadcast form ÷ {BACKEND}", 80, True, _ratio("eager, broadcast", BACKEND), r20)
    yield Goal(
        f"FSP: torch.compile of the broadcast form ÷ {BACKEND}",
        10,
        True,
        _ratio("torch.compile, broadcast", BACKEND),
        r20,
    )
    for name, operation in (("AT", "attention"), ("FSP", "fsp")):
        every = _losses(operation, *CIFAR, "resnet50-8")
        yield Goal(
            f"{name}: channels_last ÷ NCHW",
            1.25,
            False,
            SAME,
            {**every, "layout": ("channels_last",)},
            {"layout": "nchw"},
        )
    half, single = ("bfloat16",), {"dtype": "float32"}
    every = _losses("attention", *CIFAR, "resnet50-8", dtype=half, layout=("nchw", "channels_last"))
    yield Goal("AT: bfloat16 ÷ float32", 0.6, False, SAME, every, single)
    # but for ResNet-32x4's stem, every map of these has at least 64 channels
    wide = {**every, "operation": ("fsp",), "shape": ("resnet32x4-64", "resnet50-8")}
    yield Goal("FSP from 64 channels: bfloat16 ÷ float32", 1, False, SAME, wide, single)
    for name, operation, unit in (
        ("AT", "attention", "float32 maps"),
        ("FSP", "fsp", "float32 FSP matrices"),
    ):
        where = {
            **_losses(operation, *CIFAR, "resnet50-8"),
            "dtype": ("float32", "bfloat16"),
            "layout": ("nchw", "channels_last"),
        }
        yield Goal(f"{name}: extra memory", 4, False, _memory, where, unit=unit)
    tiny = _losses("attention", "tiny-2")
    forward = {**tiny, "direction": ("forward",)}
    yield Goal(
        "AT, tiny, forward, 1 thread: above torch.relu",
        15,
        False,
        _above_relu,
        forward,
        unit="µs",
        clock="process",
    )
    yield Goal(
        "AT, tiny, forward and backward, 1 thread: above torch.relu",
        45,
        False,
        _above_relu,
        tiny,
        unit="µs",
        clock="process",
    )


def _loop(*ours: str) -> Callable[[Record], float | None]:
    """The toolkit's time over the best of ours."""

    def value(record: Record) -> float | None:
        theirs, mine = (
            time_of(record, "toolkit, float32"),
            [time for row in ours if (time := time_of(record, f"loop, {row}"))],
        )
        return theirs / min(mine) if theirs and mine else None

    return value


def _loop_goals() -> Iterator[Goal]:
    for loss, single, half in (("AT", 1.5, 3.3), ("FSP", 2.5, 6)):
        yield Goal(
            f"{loss} training: toolkit's loop ÷ ours, float32",
            single,
            True,
            _loop("float32"),
            {"loop": (loss,)},
        )
        half_rows = _loop("bfloat16", "bfloat16, compiled")
        yield Goal(
            f"{loss} training: toolkit's loop ÷ ours in bfloat16", half, True, half_rows, {"loop": (loss,)}
        )
    for dtype in ("float32", "bfloat16"):
        share = _ratio(f"distillation loss in loop, {dtype}", f"loop, {dtype}")
        yield Goal(f"AT training: the loss's share of a step, {dtype}", 0.02, False, share, {"loop": ("AT",)})


def _gpu_goals(backend: str) -> Iterator[Goal]:
    """For an H100 or H200, all in one run. The streaming bandwidth is that of a plain pass over the same
    tensors, by the same clock.
    """
    eager, compiled = _ratio("eager", backend), _ratio("torch.compile", backend)
    chains = (
        ("AT", "attention", (("eager", "wall", 6), ("eager", "graph", 10), ("torch.compile", "wall", 2))),
        ("FSP", "fsp", (("eager", "wall", 3), ("eager", "graph", 5), ("torch.compile", "wall", 2))),
    )
    for name, operation, bounds in chains:
        for against, clock, bound in bounds:
            yield Goal(
                f"GPU, {name}, CIFAR chains, {clock}: {against} ÷ {backend}",
                bound,
                True,
                eager if against == "eager" else compiled,
                _losses(operation, *GPU_CHAINS),
                clock=clock,
                device="cuda",
            )
    large_at = {**_losses("attention", *GPU_LARGE), "dtype": ("float32", "bfloat16")}
    tf32 = {**_losses("fsp", *GPU_LARGE), "matmul": ("tf32",)}
    large_fsp = {**_losses("fsp", *GPU_LARGE), "dtype": ("bfloat16",)}
    for name, where, slow, fast, share in (
        ("AT, ResNet-50 stages, cold", large_at, 3, 1.2, 0.9),
        (
            "AT, ResNet-50 stages, channels_last, cold",
            {**large_at, "layout": ("channels_last",)},
            3,
            1.2,
            0.9,
        ),
        ("FSP, ResNet-50 stages, tf32, cold", tf32, 2, 1.2, 0.5),
        ("FSP, ResNet-50 stages, bfloat16, cold", large_fsp, 2, 1.2, 0.5),
    ):
        yield Goal(f"GPU, {name}: eager ÷ {backend}", slow, True, eager, where, clock="cold", device="cuda")
        yield Goal(
            f"GPU, {name}: torch.compile ÷ {backend}",
            fast,
            True,
            compiled,
            where,
            clock="cold",
            device="cuda",
        )
        bandwidth = _fact("of_streaming_bandwidth", backend)
        yield Goal(
            f"GPU, {name}: {backend}'s share of the streaming bandwidth",
            share,
            True,
            bandwidth,
            where,
            clock="cold",
            device="cuda",
        )
    step = {"step": ("AT, resnet50, batch 64, channels_last",)}
    over = _fact("over without AT", f"relu_tap, {backend}")
    yield Goal(
        f"GPU, ResNet-50 step by the ReLU tap of {backend} ÷ without AT",
        1.03,
        False,
        over,
        step,
        device="cuda",
    )
    if backend == "cuda":  # the loss's share of a whole step that a CUDA graph replays
        step = {"step": ("AT, resnet20, batch 128, channels_last",)}
        over = _fact("over without AT", f"loss, {backend}")
        yield Goal(
            "GPU, ResNet-20 step in a CUDA graph, AT ÷ without",
            1 / 0.98,
            False,
            over,
            step,
            clock="graph",
            device="cuda",
        )


def _method_goals() -> Iterator[Goal]:
    """On one thread, in process time: the published form's time over ours, and its extra memory over ours."""

    def memory(record: Record) -> float | None:
        sizes = [_fact("extra_memory", row)(record) for row in ("published", "fastkd")]
        return sizes[0] / max(sizes[1], 1) if sizes[0] and sizes[1] is not None else None

    times, cases = (
        _ratio("published", "fastkd"),
        {"crd": 20, "afd": 5, "hcl": 4, "sakd": 4, "ofd": 4, "norm": 4},
    )
    for method, bound in {**cases, "reviewkd": 1.5, "semckd": 1.5}.items():
        yield Goal(
            f"{method}: published ÷ fastkd", bound, True, times, {"method": (method,)}, clock="process"
        )
    where = {"method": ("crd step",)}
    yield Goal("crd step: published ÷ fastkd", 2.8, True, times, where, clock="process")
    for case, bound in (("batch 64, width 64", 3), ("batch 256, width 512", 8)):
        where = {"method": ("rkd",), "case": (case,)}
        yield Goal(f"rkd, {case}: published ÷ fastkd", bound, True, times, where, clock="process")
    where = {"method": ("crd",)}
    yield Goal("crd: memory, published ÷ fastkd", 30, True, memory, where, clock="process")


GOALS = (*_goals(), *_method_goals(), *_loop_goals(), *_gpu_goals("triton"), *_gpu_goals("cuda"))
