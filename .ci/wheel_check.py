"""One wheel for every PyTorch: builds it beside one version, looks at its tag and symbols, and runs the
operations beside others.

    python .ci/wheel_check.py                               beside this interpreter's PyTorch and 2.13.0
    python .ci/wheel_check.py --run 2.11.0 2.13.0 newest    the oldest, a small CPU-only one, the newest
    python .ci/wheel_check.py --build 2.11.0                built beside the oldest instead
    python .ci/wheel_check.py --environments DIR --prepare 2.11.0    that environment now, for later

``current`` is the PyTorch of the interpreter that runs this file; every other version gets a virtual
environment of its own, a fresh one, or one that ``--prepare`` left in ``--environments``.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# PyTorch's C functions, the only part of it with a stable ABI
SHIM = re.compile(r"(aoti_)?torch_[a-z0-9_]+$")
SYSTEM = re.compile(r"@+(GLIBC|GLIBCXX|CXXABI|GCC)_")
NEEDED = re.compile(
    r"(libtorch_cpu|libtorch_cuda|libstdc\+\+|libgcc_s|libc|libm|libdl|librt|libpthread|ld-linux-[\w-]+)\.so[.\d]*$"
)


def call(*command: str | Path, path: str = "", cwd: Path | None = None) -> str:
    """Runs a command, shows it, and returns what it wrote; stops everything with its output if it fails."""
    print("$", *command, flush=True)
    # every symbol is looked up when the library is loaded, not when it is first called
    environment = {**os.environ, "PYTHONPATH": path, "LD_BIND_NOW": "1"}
    # commands of packages in that folder
    environment["PATH"] = os.pathsep.join((f"{path}/bin", os.environ["PATH"]))
    done = subprocess.run([*map(str, command)], env=environment, cwd=cwd, text=True, capture_output=True)
    if done.returncode:
        raise SystemExit(f"{done.stdout}{done.stderr}\nwheel check: {' '.join(map(str, command))} failed")
    return done.stdout


class Beside:
    """An interpreter with one version of PyTorch, and a folder on its path for what is tried."""

    def __init__(self, version: str, work: Path, environments: Path) -> None:
        self.python, self.extra = Path(sys.executable), work / f"beside-{version}"
        if version != "current":
            folder = environments / f"torch-{version}"
            self.python = folder / "bin" / "python"
            if folder.exists():
                return
            venv.create(folder, with_pip=True)
            self.call(
                "-m", "pip", "install", "--quiet", "torch" if version == "newest" else f"torch=={version}"
            )

    def call(self, *arguments: str | Path, cwd: Path | None = None) -> str:
        return call(self.python, *arguments, path=str(self.extra), cwd=cwd)

    def add(self, *requirements: str | Path) -> None:
        self.call("-m", "pip", "install", "--quiet", "--no-deps", "--target", self.extra, *requirements)


def build(beside: Beside, work: Path) -> Path:
    """The wheel, built from the sdist, so that a file which that one lacks is missed here."""
    beside.add("setuptools>=77", "ninja")
    beside.call("-c", f"import setuptools.build_meta as b; b.build_sdist({str(work)!r})", cwd=ROOT)
    (sdist,) = work.glob("fastkd-*.tar.gz")
    beside.call(
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        work / "wheel",
        sdist,
    )
    (wheel,) = (work / "wheel").glob("*.whl")
    return wheel


def check_symbols(library: Path) -> None:
    undefined = [
        line.split()[-1]
        for line in call("nm", "-D", "--undefined-only", library).splitlines()
        if line.split()[-2] == "U"
    ]
    strange = [name for name in undefined if not SHIM.match(name) and not SYSTEM.search(name)]
    if strange or not any(map(SHIM.match, undefined)):
        raise SystemExit(
            f"wheel check: {library.name} depends on what is no stable ABI:"
            f" {', '.join(strange) or 'nothing of PyTorch at all'}"
        )
    dynamic = call("readelf", "-d", "-W", library)
    needed = re.findall(r"NEEDED.*\[(.+)\]", dynamic)
    foreign = [name for name in needed if not NEEDED.match(name)] + re.findall(r"R(?:UN)?PATH.*", dynamic)
    if foreign:
        raise SystemExit(f"wheel check: {library.name} asks for {', '.join(foreign)}")
    print(
        f"{library.name}: {sum(map(bool, map(SHIM.match, undefined)))} functions of PyTorch's C shim; needs"
        f" {', '.join(needed)}"
    )


def check_wheel(wheel: Path, work: Path) -> None:
    print(f"{wheel.name}: {wheel.stat().st_size / 1024:.0f} KiB")
    if "-cp310-abi3-" not in wheel.name:
        raise SystemExit(f"wheel check: the tag of {wheel.name} is not cp310-abi3")
    with zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if name.endswith(".so")]
        archive.extractall(work / "unpacked", libraries)
    if "fastkd/_C.abi3.so" not in libraries:
        raise SystemExit(f"wheel check: {wheel.name} has no fastkd/_C.abi3.so")
    for name in libraries:
        check_symbols(work / "unpacked" / name)


def operations() -> None:
    """Runs beside each PyTorch: every operation, forward and backward, by the reference and by the compiled
    kernels, in a graph too.
    """
    import torch

    import fastkd
    from fastkd import native, reference

    assert Path(fastkd.__file__).is_relative_to(os.environ["PYTHONPATH"]), (
        f"{fastkd.__file__} is a source tree, not the wheel"
    )
    assert native.CPU.available, native.CPU.reason
    assert native.CUDA.available or torch.version.cuda is None or native.CUDA.path is None, native.CUDA.reason
    calls = {
        "attention_map": (
            lambda m, s, t: (
                m.attention_map(s[0]).pow(3).sum() + m.attention_map(s[1], p=3.0, normalize=False).sum()
            )
        ),
        "attention_transfer_loss": lambda m, s, t: m.attention_transfer_loss(s, t, weight=1000.0),
        "fsp_matrix": lambda m, s, t: m.fsp_matrix(s[0], s[1]).square().sum(),
        "fsp_loss": lambda m, s, t: m.fsp_loss(s, t),
    }
    shapes = [(4, 8, 16, 16), (4, 16, 8, 8), (4, 24, 7, 7)]
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        student, teacher = ([torch.randn(shape).to(dtype) for shape in shapes] for _ in range(2))
        for name, function in calls.items():
            results = []
            torch.compiler.reset()
            compiled = torch.compile(functools.partial(function, fastkd), fullgraph=True, backend="aot_eager")
            for backend, run in (
                ("reference", functools.partial(function, reference)),
                ("cpp", functools.partial(function, fastkd)),
                ("cpp", compiled),
            ):
                leaves = [x.clone().requires_grad_() for x in student]
                with fastkd.use_backend(backend):
                    value = run(leaves, teacher)
                    value.backward()
                results.append((value, [x.grad for x in leaves]))
            (value_wanted, grads_wanted), *found = results
            for value, grads in found:
                torch.testing.assert_close(
                    value, value_wanted.to(value.dtype), rtol=tolerance, atol=tolerance
                )
                for x, grad, wanted in zip(student, grads, grads_wanted, strict=True):
                    assert (grad is None) == (wanted is None), name
                    if grad is not None and wanted is not None:
                        assert grad.dtype == x.dtype
                        torch.testing.assert_close(
                            grad,
                            wanted,
                            rtol=tolerance,
                            atol=tolerance * max(1e-6, wanted.abs().max().item()),
                        )
    print(
        f"operations right beside torch {torch.__version__}, Python {sys.version.split()[0]}, CPU path"
        f" {native.cpu_path()}"
    )


def check_beside(beside: Beside, wheel: Path, work: Path) -> None:
    beside.add(wheel)
    print(beside.call(Path(__file__).resolve(), "--operations", cwd=work), end="")
    report = json.loads(beside.call("-m", "fastkd", "--json", cwd=work))
    if not report["backends"]["cpp"]["available"]:
        raise SystemExit(f"wheel check: python -m fastkd says that cpp is not available: {report}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--build", default="current", metavar="VERSION", help="the PyTorch to build beside (default: current)"
    )
    parser.add_argument(
        "--run",
        nargs="+",
        default=["current", "2.13.0"],
        metavar="VERSION",
        help="those to run beside (default: current 2.13.0)",
    )
    parser.add_argument(
        "--environments", type=Path, metavar="DIR", help="where virtual environments are kept"
    )
    parser.add_argument(
        "--prepare", nargs="+", metavar="VERSION", help="make their environments, and no more"
    )
    parser.add_argument("--operations", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.operations:
        return operations()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        environments = options.environments or work
        versions = [*dict.fromkeys(options.prepare or [options.build, *options.run])]
        with ThreadPoolExecutor(len(versions)) as pool:  # pip fetches and unpacks on one CPU
            made = pool.map(lambda version: Beside(version, work, environments), versions)
            known = dict(zip(versions, made, strict=True))
        if options.prepare:
            return
        wheel = build(known[options.build], work)
        check_wheel(wheel, work)
        for version in options.run:
            check_beside(known[version], wheel, work)


if __name__ == "__main__":
    main()
