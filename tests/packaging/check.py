"""Compilers and installers that the tests cannot ask of every machine: each is tried where it is there, else
a line says that it is not.

    python tests/packaging/check.py                     all of it
    python tests/packaging/check.py clang++-16 g++-11   these compilers: no warning, the kernels' tests
    python tests/packaging/check.py installers          pip and uv, with the tools of this interpreter

Needs PyTorch, setuptools, ninja and pytest. Works in copies of the tree; a compiler takes minutes.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
COMPILERS = ("g++-10", "g++-11", "clang++-16", "clang++-19")  # for aarch64: aarch64.py
KERNEL_TESTS = [
    path.relative_to(ROOT).as_posix()
    for name in ("attention", "fsp", "feature_map", "batch_norm", "grad_prefetch")
    for path in sorted(ROOT.glob(f"tests/ops/test_{name}*.py"))
] + ["tests/backends/test_backends.py", "tests/backends/test_code_paths.py"]
FASTKD = re.compile(r"^ *fastkd: .*", re.MULTILINE)


class Missing(Exception):
    """What a check needs is not on this machine."""


def run(*command: str | Path, cwd: Path, wanted: int | None = 0, **variables: str) -> str:
    """What a command wrote. `wanted`: its status, None for any but 0."""
    print("  $", *(f"{name}={value}" for name, value in variables.items()), *command, flush=True)
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CXX")
    } | variables
    pipe = subprocess.PIPE
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=environment, text=True, stdout=pipe, stderr=subprocess.STDOUT
    )
    if done.returncode != wanted and not (wanted is None and done.returncode):
        raise AssertionError(f"status {done.returncode}\n{done.stdout}")
    return done.stdout


def tree(folder: Path) -> Path:
    """A copy of the sources, without what was built."""
    leave = shutil.ignore_patterns(
        ".git", "build", "runs", "data", "*.so", "__pycache__", "*.egg-info", ".*_cache"
    )
    return Path(shutil.copytree(ROOT, folder / "tree", ignore=leave))


def small(folder: Path) -> Path:
    """The real build and metadata, with next to nothing to compile."""
    top = folder / "small"
    for part in ("csrc/cpu", "csrc/common", "fastkd"):
        (top / part).mkdir(parents=True)
    for name in (
        "setup.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "csrc/toolchain.py",
        "csrc/common/build_info.cpp",
    ):
        shutil.copy(ROOT / name, top / name)
    (top / "fastkd" / "__init__.py").write_text("__version__ = '0.0.1'\n")
    (top / "csrc" / "cpu" / "one.cpp").write_text("int one() { return 1; }\n")
    return top


def check_compiler(name: str, folder: Path) -> str:
    """Every code path of the processor's kind is built, without a warning, and the kernels are right."""
    if not shutil.which(shlex.split(name)[0]):
        raise Missing(f"{name} is not installed")
    top = tree(folder)
    macros = run(*shlex.split(name), "-dM", "-E", "-x", "c++", os.devnull, cwd=top)
    here = os.uname().machine
    if f"__{here}__" not in macros:
        raise Missing(f"{name} compiles for another processor; tests/packaging/aarch64.py does one such")
    said = run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=top, CXX=name, FASTKD_CUDA="0")
    assert "warning:" not in said, said
    show = "from fastkd import native; print(*native.cpu_paths(), *native._missing_cpu_paths())"
    paths = run(sys.executable, "-c", show, cwd=top, PYTHONPATH=str(top)).strip()
    assert here != "x86_64" or "not built" not in paths, paths
    tests = run(
        sys.executable,
        "-m",
        "pytest",
        "-q",
        *(["-n", "auto"] if importlib.util.find_spec("xdist") else []),
        *KERNEL_TESTS,
        "-k",
        "cpp or code_path",
        cwd=top,
        PYTHONPATH=str(top),
    )
    return f"{paths}; {tests.strip().splitlines()[-1]}"


def check_hidden_installation(folder: Path) -> str:
    """`pip install .` in a clone, then train.py there: the reason is named, and the way out works."""
    top, site = tree(folder), folder / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    train = "train.py --method at --dataset digits --epochs 1 --teacher resnet8 --student resnet8".split()
    run(*pip, "--target", site, ".", cwd=top)
    assert "loaded" in run(sys.executable, "-m", "fastkd", cwd=folder, PYTHONPATH=str(site))
    hidden = run(sys.executable, "-m", "fastkd", cwd=top, PYTHONPATH=str(site))
    reason = (
        f"{top / 'fastkd'} has no compiled library and hides the installed package in {site / 'fastkd'}: `pip"
        " install -e .` builds it here"
    )
    assert reason in hidden, hidden
    said = run(
        sys.executable, *train, "--no-pictures", "--output", folder / "runs", cwd=top, PYTHONPATH=str(site)
    )
    assert f"no compiled kernels, plain PyTorch instead: {reason}" in said, said
    run(
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "tests/ops/test_feature_map_bits.py",
        "-k",
        "gives_the_same_answers",
        cwd=top,
        PYTHONPATH=f"{top}:{site}",
    )
    return "named by `python -m fastkd` and by train.py"


def check_old_setuptools(folder: Path) -> str:
    top, old = small(folder), folder / "old"
    run(sys.executable, "-m", "pip", "install", "--quiet", "--target", old, "setuptools==65.5.0", cwd=folder)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, "."]
    return one_sentence(
        run(*pip, cwd=top, wanted=None, PYTHONPATH=str(old)), "building needs setuptools>=77, found 65.5.0"
    )


def check_broken_compiler(folder: Path) -> str:
    top = small(folder)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, "."]
    return one_sentence(
        run(*pip, cwd=top, wanted=None, CXX="false"), "'false' does not work as a C++ compiler"
    )


def one_sentence(said: str, wanted: str) -> str:
    (sentence,) = FASTKD.findall(said)
    assert wanted in sentence and "Traceback" not in said, said
    return f"{sentence.strip()!r} among pip's {len(said.splitlines())} lines"


def check_pure_python(folder: Path) -> str:
    """An isolated build with FASTKD_BUILD=0 fetches setuptools alone."""
    pip = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", folder, "."]
    said = run(*pip, cwd=small(folder), FASTKD_BUILD="0")
    fetched = set(re.findall(r"^ *Collecting (\w+)", said, re.MULTILINE))
    assert fetched == {"setuptools"}, said
    return "fetches setuptools only"


def check_uv(folder: Path) -> str:
    """A project that depends on the source tree: uv builds anew for a reason, and only then."""
    if not shutil.which("uv"):
        raise Missing("uv is not installed")
    top, project = small(folder), folder / "project"
    text = (top / "pyproject.toml").read_text(encoding="utf-8")
    (top / "pyproject.toml").write_text(
        text.replace('dependencies = ["torch>=2.11"]', "dependencies = []"), encoding="utf-8"
    )
    project.mkdir()
    needs = (
        'name = "project"\nversion = "1"\nrequires-python = ">=3.10"\ndependencies = ["fastkd @'
        f' {top.as_uri()}"]\n'
    )
    (project / "pyproject.toml").write_text(f"[project]\n{needs}")

    def built(**variables: str) -> bool:
        uv = [
            "uv",
            "pip",
            "install",
            "--no-build-isolation",
            "--python",
            sys.executable,
            "--target",
            folder / "uv",
            "-r",
            "pyproject.toml",
        ]
        return "Built fastkd" in run(
            *uv, cwd=project, FASTKD_CUDA="0", UV_CACHE_DIR=str(folder / "cache"), **variables
        )

    assert built(FASTKD_BUILD="0") and not built(FASTKD_BUILD="0")
    assert built() and not built()
    assert (folder / "uv" / "fastkd" / "_C.abi3.so").is_file()
    (top / "csrc" / "cpu" / "one.cpp").write_text("int one() { return 11; }\n")
    assert built() and not built()
    assert built(CXXFLAGS="-O1")
    return "builds anew after an edit and for other variables, and not otherwise"


INSTALLERS: list[Callable[[Path], str]] = [
    check_old_setuptools,
    check_broken_compiler,
    check_pure_python,
    check_uv,
    check_hidden_installation,
]


def main() -> int:
    wanted = sys.argv[1:] or [*COMPILERS, "installers"]
    checks: list[tuple[str, Callable[[Path], str]]] = []
    for name in wanted:
        if name == "installers":
            checks += [
                (check.__name__.removeprefix("check_").replace("_", " "), check) for check in INSTALLERS
            ]
        else:
            checks.append((name, lambda folder, name=name: check_compiler(name, folder)))  # type: ignore[misc]
    failed = 0
    for name, check in checks:
        with tempfile.TemporaryDirectory() as folder:
            try:
                print(f"{name}: {check(Path(folder).resolve())}", flush=True)
            except Missing as why:
                print(f"{name}: skipped, {why}", flush=True)
            except AssertionError as error:
                failed += 1
                print(f"{name}: FAILED, {error}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
