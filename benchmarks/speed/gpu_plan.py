"""What benchmarks/gpu.py runs: parts by worth, each with its limit."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CUDA = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")  # where tools are that PATH lacks
COMPILING = 2  # processes of a part that compiles
TILES_SECONDS = 300  # for all tiles, if nothing is measured before

SPEED = (
    ("attention chains", "attention", "resnet20-128"),
    ("attention at ResNet-50 stages", "attention", "resnet50-64"),
    ("fsp chains", "fsp", "resnet20-128"),
    ("fsp at ResNet-50 stages", "fsp", "resnet50-64"),
    ("resnet20 step", "step", "resnet20"),
    ("losses of embeddings", "methods", "crd or rkd"),
    ("attention wide chains", "attention", "wrn40_2-128 or resnet32x4-128"),
    ("fsp wide chains", "fsp", "wrn40_2-128 or resnet32x4-128"),
    ("resnet50 step", "step", "resnet50"),
)
# where tests are that a GPU changes: of the whole tree, collecting alone would take half of their time
PLACES = ("tests/backends", "tests/ops", "tests/training/test_step.py")
# of Triton's tests, those whose answer an interpreter cannot give: graphs, streams, waiting, repeated bits,
# races, faults
ON_DEVICE = (
    "captured or compiled_step or waits or streams or same_bits or not_current or large_gradients or no_fault"
)


@dataclass(frozen=True)
class Part:
    """A command, how many seconds it may take, variables of its own, and its processes that compute."""

    name: str
    command: tuple[str, ...]
    seconds: float
    variables: tuple[tuple[str, str], ...] = ()
    measures: bool = False  # alone on the device
    processes: int = 1


def own(name: str, seconds: float, *, measures: bool = False) -> Part:
    """A part of benchmarks/speed/gpu_parts.py."""
    command = (sys.executable, "-m", "speed.gpu_parts", name.split()[0], *name.split()[1:])
    return Part(name, command, seconds, measures=measures)


def pytest_part(
    name: str, seconds: float, *arguments: str, processes: int = 0, measures: bool = False
) -> Part:
    # a file that lacks a package must not keep the others from running
    keep_on = "--continue-on-collection-errors"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", keep_on]
    processes = min(processes, os.cpu_count() or 1)  # more would only wait for each other
    if processes and find_spec("xdist"):
        command += ["-n", str(processes)]
    else:
        processes = 1
    return Part(name, (*command, *arguments), seconds, measures=measures, processes=processes)


def speed_part(
    name: str, seconds: float, group: tuple[str, str, str], mode: tuple[str, ...], rehearse: bool
) -> Part:
    _, file, shape = group
    # without a GPU the bodies are run once, on small shapes
    words = f"({shape}) and cuda" if not rehearse else f"{shape if file == 'step' else 'small'} and cpu"
    return pytest_part(name, seconds, *mode, "-k", words, f"benchmarks/test_{file}.py", measures=True)


def compiling(rehearse: bool) -> list[Part]:
    """What fills the caches of compiled kernels while parts check: the speed groups, the most telling first,
    whose times count for nothing then, and the tiles.
    """
    # what torch.compile chooses by measuring beside other work must not be kept
    variables = (
        ("TORCHINDUCTOR_AUTOTUNE_LOCAL_CACHE", "0"),
        ("TORCHINDUCTOR_COMPILE_THREADS", str(COMPILING)),
    )
    mode = () if rehearse else ("--benchmark",)
    parts = [speed_part(f"compiling for {group[0]}", 0, group, mode, rehearse) for group in SPEED]
    tiles = own(f"compile-tiles {TILES_SECONDS} {COMPILING}", 0)
    return [
        replace(
            part, command=("nice", *part.command), variables=variables, measures=False, processes=COMPILING
        )
        for part in (*parts, replace(tiles, name="compile-tiles"))
    ]


def sanitizer(kind: str) -> Part | None:
    folders = [os.environ.get("PATH"), *CUDA]
    tool = shutil.which("compute-sanitizer", path=os.pathsep.join(filter(None, folders)))
    if tool is None:
        return None
    command = (
        tool,
        "--tool",
        kind,
        "--target-processes",
        "all",
        "--error-exitcode",
        "9",
        *own("small-set", 0).command,
    )
    # each tensor an allocation of its own, so that one byte beyond it is seen
    return Part(kind, command, 45, (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),))


def plan(rehearse: bool) -> list[Part]:
    """The parts, by worth: is it right, on every dtype and layout; do its own tests hold; is memory touched
    rightly; how fast is it.
    """
    place = (
        ("-m", "not large", "-x", "tests/backends/test_cuda.py")
        if rehearse
        else ("-m", "gpu and not large", *PLACES)
    )
    cuda = ("-k", "same_bits") if rehearse else ("-k", "cuda and not triton")
    triton = ("-k", "same_bits") if rehearse else ("-k", f"triton and ({ON_DEVICE})")
    parts: list[Part | None] = [
        own("facts", 15),
        own("smoke cuda", 25),
        own("smoke triton", 40),
        pytest_part("tests of cuda", 80, *place, *cuda, processes=5),
        pytest_part(
            "tests of triton",
            60,
            *(("-x", "tests/backends/test_triton.py") if rehearse else place),
            *triton,
            processes=10,
        ),
        sanitizer("memcheck"),
        sanitizer("racecheck"),
        own("launches", 20, measures=True),
        own("rates", 15, measures=True),
    ]
    for group in SPEED:
        results = f"speed/{group[0].replace(' ', '-')}"
        mode = () if rehearse else ("--benchmark", "--benchmark-results", results)
        parts.append(speed_part(f"speed: {group[0]}", 45, group, mode, rehearse))
    parts.append(own("tiles", 75, measures=True))
    parts.append(pytest_part("large tensors", 60, "-m", "gpu and large", PLACES[0], measures=True))
    return [part for part in parts if part is not None]


def left_out(data: Path | None, rehearse: bool) -> list[str]:
    """What cannot run on this machine, and why, a line each."""
    lines = []
    if sanitizer("memcheck") is None:
        lines.append(
            "memcheck, racecheck: left out, compute-sanitizer is not on PATH nor under /usr/local/cuda"
        )
    if not training(data, rehearse):
        lines.append(f"training: left out, neither CIFAR-10 nor Fashion-MNIST lies in --data ({data})")
    lacking = [name for name in ("pytest", "xdist") if not find_spec(name)]
    told = {"pytest": "no tests and no speed", "xdist": "tests in one process"}
    return lines + [f"{name} is not installed: {told[name]}" for name in lacking]


def training(data: Path | None, rehearse: bool) -> list[Part]:
    """speed/gpu_training.py; nothing without images."""
    there = {"cifar10": ("cifar-10-batches-py", "cifar-10-batches-bin"), "fashion-mnist": ("FashionMNIST",)}
    name = next(
        (
            name
            for name, folders in there.items()
            if data and any((data / folder).is_dir() for folder in folders)
        ),
        None,
    )
    if name is None and not (rehearse and find_spec("sklearn")):
        return []
    command = [sys.executable, "-m", "speed.gpu_training", name or "digits"]
    command += [str(data)] if name else []
    return [Part("training in the background", tuple(command), 0)]
