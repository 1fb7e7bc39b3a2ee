"""All that can be proven and measured on one machine with a GPU, in one command, without a network; ten minutes are meant to suffice.

    python benchmarks/gpu.py                       results into benchmarks/results/<device>/
    python benchmarks/gpu.py --out DIR --only tests,speed
    python benchmarks/gpu.py --rehearse            the same on a machine without a GPU, as far as that goes; nothing is measured

In this order, each step writing what it found at once, so that a run cut short has left the most: versions and clocks; the tests marked
`gpu`; how many kernels a call launches; compute-sanitizer (memcheck, racecheck) over a small set; copy bandwidth and matrix rates; the
losses (``pytest --benchmark``, its groups on a GPU); a whole ResNet-50 step. A step that fails does not stop the next.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE.parent / "tests")]

import torch  # noqa: E402
from speed import machine  # noqa: E402
from speed.cases import Case, features  # noqa: E402
from speed.gpu import CHAINS, LARGE  # noqa: E402

import fastkd  # noqa: E402
from fastkd import backends  # noqa: E402

LOSSES: dict[str, Callable[..., torch.Tensor]] = {"attention": fastkd.attention_transfer_loss, "gram": fastkd.fsp_loss}
SANITIZERS = ("memcheck", "racecheck")


class Run:
    """Where results go, and whether this is a rehearsal."""

    def __init__(self, out: Path, rehearse: bool):
        self.out, self.rehearse = out, rehearse
        self.device = "cpu" if rehearse else "cuda"
        out.mkdir(parents=True, exist_ok=True)

    def save(self, name: str, text: str) -> None:
        target = self.out / name
        temporary = target.with_name(f".{name}.tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(target)

    def save_json(self, name: str, value: Any) -> None:
        self.save(name, json.dumps(value, indent=1) + "\n")

    def command(self, name: str, command: list[str], limit: float) -> int:
        """Run a command in the project's folder; what it printed becomes a file, also when it takes too long."""
        environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
        with (self.out / name).open("w", encoding="utf-8") as file:
            file.write(f"$ {' '.join(command)}\n")
            file.flush()
            try:
                status = subprocess.run(
                    command, cwd=HERE.parent, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=limit
                ).returncode
            except subprocess.TimeoutExpired:
                status = -1
            file.write(f"status {status}{' (stopped: too long)' if status == -1 else ''}\n")
        return status


def names_of_backends() -> list[str]:
    return [name for name in ("triton", "cuda") if backends.availability()[name][0]]


def versions(run: Run) -> str:
    facts = machine.facts(sys.argv)
    facts["backends"] = {name: list(state) for name, state in backends.availability().items()}
    facts["triton"] = machine.version("triton")
    if not run.rehearse:
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "count": torch.cuda.device_count(),
        }
    if shutil.which("nvidia-smi"):
        done = subprocess.run(["nvidia-smi", "-q", "-d", "CLOCK,PERFORMANCE,POWER"], capture_output=True, text=True)
        facts["nvidia_smi"] = done.stdout.splitlines()
    run.save_json("gpu-versions.json", facts)
    return f"{facts.get('gpu', {}).get('name', 'no GPU')}, torch {torch.__version__}, triton {facts['triton']}"


def tests(run: Run) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu and not large", "-p", "no:cacheprovider", "tests"]
    status = run.command("gpu-tests.txt", command, 240)
    return f"status {status}: {_last_line(run.out / 'gpu-tests.txt')}"


def large(run: Run) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu and large", "-p", "no:cacheprovider", "tests"]
    status = run.command("gpu-tests-large.txt", command, 90)
    return f"status {status}: {_last_line(run.out / 'gpu-tests-large.txt')}"


def _last_line(file: Path) -> str:
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line and not line.startswith("status ")]
    return lines[-1] if lines else "nothing printed"


def _inputs(run: Run, operation: str, shape: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    students, teachers = features(Case(operation, "small" if run.rehearse else shape))
    return [x.detach().to(run.device).requires_grad_() for x in students], [x.to(run.device) for x in teachers]


def launches(run: Run) -> str:
    """Kernels of one call each way, by name, as the profiler saw them."""
    kind = torch.profiler.ProfilerActivity.CPU if run.rehearse else torch.profiler.ProfilerActivity.CUDA
    found: dict[str, Any] = {}
    for backend in names_of_backends():
        for operation, loss in LOSSES.items():
            for shape in (CHAINS[0], LARGE):
                students, teachers = _inputs(run, operation, shape)
                try:
                    with fastkd.use_backend(backend):
                        for _ in range(3):
                            loss(students, teachers).backward()
                        for x in students:
                            x.grad = None
                        counts: dict[str, Any] = {}
                        value = None
                        for direction in ("forward", "backward"):
                            _wait(run)
                            with torch.profiler.profile(activities=[kind], acc_events=True) as profile:
                                if direction == "forward":
                                    value = loss(students, teachers)
                                else:
                                    assert value is not None
                                    value.backward()
                                _wait(run)
                            counts[direction] = {event.key: event.count for event in profile.key_averages()}
                except fastkd.BackendError as error:
                    counts = {"error": str(error)}
                found[f"{backend} {operation} {shape}"] = counts
    run.save_json("gpu-launches.json", found)
    return "; ".join(
        f"{name}: " + ", ".join(f"{d} {sum(v.values())}" if isinstance(v, dict) else str(v) for d, v in counts.items())
        for name, counts in found.items()
    )


def _wait(run: Run) -> None:
    if not run.rehearse:
        torch.cuda.synchronize()


def small_set(run: Run) -> str:
    """What compute-sanitizer watches: each operation and its backward pass on a few small shapes, layouts and dtypes."""
    calls = 0
    for backend in names_of_backends():
        for dtype in (torch.float32, torch.bfloat16):
            for layout in (torch.contiguous_format, torch.channels_last):
                sizes = [(16, 14), (17, 7), (32, 5)]
                students, teachers = (
                    [torch.randn(3, c, n, n).to(dtype).to(run.device, memory_format=layout) for c, n in sizes] for _ in range(2)
                )
                for x in students:
                    x.requires_grad_()
                with fastkd.use_backend(backend):
                    fastkd.attention_transfer_loss(students, teachers, weight=1000.0).backward()
                    fastkd.attention_map(students[1]).sum().backward()
                    for pool_mode in ("avg", "max"):
                        fastkd.fsp_loss(students, teachers, pool_mode=pool_mode).backward()
                    fastkd.fsp_matrix(students[0], students[1]).sum().backward()
                    for pair in (fastkd.tap(students[0]), fastkd.relu_tap(students[1])):
                        (pair[0].float().sum() + pair[1].sum()).backward()
                calls += 7
    _wait(run)
    return f"{calls} calls"


def sanitizer(run: Run) -> str:
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None or run.rehearse:
        return "rehearsed without: " + small_set(run) if run.rehearse else "compute-sanitizer is not on PATH"
    told = []
    for kind in SANITIZERS:
        command = [tool, "--tool", kind, "--target-processes", "all", "--error-exitcode", "9"]
        command += [sys.executable, str(HERE / "gpu.py"), "--small-set"]
        status = run.command(f"gpu-sanitizer-{kind}.txt", command, 120)
        told.append(f"{kind}: status {status}, {_last_line(run.out / f'gpu-sanitizer-{kind}.txt')}")
    return "; ".join(told)


def rates(run: Run) -> str:
    """Bandwidth of a plain copy, beyond the cache, and rates of square matrix products."""
    size, side = (2**12, 32) if run.rehearse else (2**28, 8192)
    found: dict[str, float] = {}
    a, b = (torch.empty(size, device=run.device).uniform_() for _ in range(2))
    found["copy GB/s"] = 2 * a.nbytes / _seconds(run, lambda: b.copy_(a)) / 1e9
    for name, dtype, tf32 in (
        ("float32, ieee", torch.float32, False), ("float32, tf32", torch.float32, True), ("bfloat16", torch.bfloat16, False),
    ):  # fmt: skip
        torch.backends.cuda.matmul.allow_tf32 = tf32
        x, y = (torch.randn(side, side, device=run.device).to(dtype) for _ in range(2))
        found[f"{name} TFLOP/s"] = 2 * side**3 / _seconds(run, functools.partial(torch.mm, x, y)) / 1e12
    torch.backends.cuda.matmul.allow_tf32 = False
    run.save_json("gpu-rates.json", found)
    return ", ".join(f"{name} {value:.1f}" for name, value in found.items())


def _seconds(run: Run, call: Callable[[], Any], rounds: int = 7, calls: int = 10) -> float:
    """The median over rounds of several calls."""
    call()
    readings = []
    for _ in range(rounds):
        _wait(run)
        begun = time.perf_counter()
        for _ in range(calls):
            call()
        _wait(run)
        readings.append((time.perf_counter() - begun) / calls)
    return sorted(readings)[rounds // 2]


def speed(run: Run) -> str:
    mode = [] if run.rehearse else ["--benchmark", "--benchmark-results", str(run.out)]
    command = [sys.executable, "-m", "pytest", "-q", *mode, "-p", "no:cacheprovider", "-k", run.device, "benchmarks"]
    status = run.command("gpu-speed.txt", command, 330)
    return f"status {status}: {_last_line(run.out / 'gpu-speed.txt')}"


STEPS = {
    "versions": versions, "tests": tests, "launches": launches, "sanitizer": sanitizer, "rates": rates, "speed": speed, "large": large,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=lambda text: Path(os.path.expanduser(text)), help="folder for the results (default: benchmarks/results/<device>)"
    )
    parser.add_argument("--only", help=f"steps, separated by commas, of {', '.join(STEPS)}")
    parser.add_argument("--rehearse", action="store_true", help="run on the CPU, with Triton interpreted and the CUDA kernels emulated")
    parser.add_argument("--small-set", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.rehearse and not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device; --rehearse goes as far as that allows")
    if args.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
        import emulated  # of the tests

        emulated.load()
    wanted = args.only.split(",") if args.only else list(STEPS)
    unknown = [name for name in wanted if name not in STEPS]
    if unknown:
        parser.error(f"--only: unknown step {', '.join(unknown)}, wanted some of {', '.join(STEPS)}")
    device = "rehearsal" if args.rehearse else torch.cuda.get_device_name()
    if args.small_set:
        print(small_set(Run(args.out or Path("."), args.rehearse)))
        return 0
    run = Run(args.out or HERE / "results" / machine.slug(device), args.rehearse)
    begun, failed = time.perf_counter(), False
    for name in wanted:
        try:
            told = STEPS[name](run)
        except Exception as error:  # the next step may still work
            told, failed = f"FAILED: {type(error).__name__}: {error}", True
        print(f"{time.perf_counter() - begun:4.0f} s  {name}: {told}", flush=True)
    print(f"results: {run.out}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
