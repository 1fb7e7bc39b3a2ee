"""What setup.py builds with: compiler, PyTorch's headers, CUDA toolkit, architectures, ninja.

Each is found, or the build ends in one sentence that says what is missing. Needs nothing but Python.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

TORCH_TARGET = "2.11"  # the oldest PyTorch served
TARGET_BYTES = "0x020b000000000000"  # the same for its headers
PURE = "FASTKD_BUILD=0 to install without compiling (Triton on a GPU, the PyTorch reference on the CPU)"
OLDEST_GCC, OLDEST_CLANG = 10, 16  # clang of all code paths
CODE_PATHS = {  # by the compiler's macro for the processor: bytes of a vector
    "__x86_64__": {"portable": 16, "avx2": 32, "avx512": 64},
    "__aarch64__": {"portable": 16, "neon": 16},
}
ARCHITECTURES = ["8.0", "9.0", "10.0"]
NAMED = {  # as in torch.utils.cpp_extension, which the tests compare
    "Kepler": "3.5+PTX",
    "Kepler+Tesla": "3.7",
    "Maxwell": "5.0;5.2+PTX",
    "Maxwell+Tegra": "5.3",
    "Pascal": "6.0;6.1+PTX",
    "Volta": "7.0+PTX",
    "Volta+Tegra": "7.2",
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ampere+Tegra": "8.7",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
    "Blackwell+Tegra": "11.0",
    "Rubin": "10.7+PTX",
}


class Failure(SystemExit):
    """One sentence instead of a traceback: pip shows what stands on stderr."""

    def __init__(self, message: str) -> None:
        super().__init__(f"\nfastkd: {message}.\n")


class Cuda(NamedTuple):
    """What the CUDA library is built with; `toolkit` is None where it is not built. `why` or why not."""

    toolkit: Path | None
    architectures: list[str]  # "8.0", "9.0+PTX"
    why: str


def switch(name: str, default: str, *choices: str) -> str:
    value = os.environ.get(name, default)
    if value not in choices:
        raise Failure(f"{name} is {value!r}, wanted {' or '.join(choices)}")
    return value


def words(name: str) -> list[str]:
    """A variable of the environment that holds flags."""
    return shlex.split(os.environ.get(name, ""))


def output_of(command: list[str]) -> str:
    """What a command writes; OSError or CalledProcessError if it fails."""
    return subprocess.run(command, check=True, text=True, capture_output=True).stdout


def jobs() -> int:
    """MAX_JOBS, or the CPUs that this process may use: those it is bound to, within its container's share."""
    value = os.environ.get("MAX_JOBS", "")
    if value:
        if not value.isdigit() or int(value) < 1:
            raise Failure(f"MAX_JOBS is {value!r}, wanted a number from 1 up")
        return int(value)
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max", where nothing limits it
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        cpus = min(cpus, max(1, quota // period))
    return cpus


def cxx() -> tuple[list[str], str, dict[str, int]]:
    """The C++ compiler's command, CXX or the first of the usual names that is there; its name and version;
    the code paths for the processor it compiles for.
    """
    named = os.environ.get("CXX")
    usual = [name for name in ("c++", "g++", "clang++") if shutil.which(name)] or ["c++"]
    command = shlex.split(named) if named else usual[:1]
    instead = f"install g++ or clang++, set CXX, or set {PURE}"
    if not shutil.which(command[0]):
        raise Failure(f"no C++ compiler found ({command[0]!r} is not a command); {instead}")
    try:
        said = output_of([*command, "-dM", "-E", "-x", "c++", os.devnull])
        version = output_of([*command, "--version"]).splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        said = version = ""
    macros = dict(re.findall(r"#define (\w+) (.*)", said))
    if "__cplusplus" not in macros:
        raise Failure(f"{shlex.join(command)!r} does not work as a C++ compiler; {instead}")
    clang = int(macros.get("__clang_major__", 0))
    if not clang and int(macros.get("__GNUC__", OLDEST_GCC)) < OLDEST_GCC:
        raise Failure(f"the C++ compiler is {version}, wanted GCC {OLDEST_GCC} or later, or clang; {instead}")
    if 0 < clang < OLDEST_CLANG and "__x86_64__" in macros:
        print(
            f"fastkd: {version} builds the portable code path only, clang {OLDEST_CLANG} and GCC all three",
            file=sys.stderr,
        )
    here = [paths for macro, paths in CODE_PATHS.items() if macro in macros]
    return command, version, here[0] if here else {"portable": 16}


def torch() -> tuple[Path, str]:
    """PyTorch's folder and version, without importing it: that takes seconds, and pip runs this often."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        without = "install it first, or leave out --no-build-isolation"
        raise Failure(f"building needs torch>={TORCH_TARGET}: {without}, or set {PURE}")
    folder = Path(spec.submodule_search_locations[0])
    found = re.search(r"__version__\s*=\s*'([^']+)'", (folder / "version.py").read_text())
    version = found.group(1) if found else "0"
    if numbers(version)[:2] < numbers(TORCH_TARGET):
        older = f"building needs torch>={TORCH_TARGET}, found {version} in {folder}"
        raise Failure(f"{older}; upgrade it, or set {PURE}")
    if not (folder / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
        bare = f"torch {version} in {folder} has no C++ headers"
        raise Failure(f"{bare}; install a complete one, or set {PURE}")
    return folder, version


def numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def cuda() -> Cuda:
    """After FASTKD_CUDA and TORCH_CUDA_ARCH_LIST; by itself where a GPU is seen, for that GPU."""
    wish = switch("FASTKD_CUDA", "auto", "0", "1", "auto")
    named = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if wish == "0":
        return Cuda(None, [], "FASTKD_CUDA=0")
    toolkit, missing = cuda_toolkit()
    if toolkit is None and wish == "1":
        raise Failure(f"FASTKD_CUDA=1, but no CUDA toolkit: {missing}")
    if named and named != "native":
        return Cuda(toolkit, architectures(named), missing or f"TORCH_CUDA_ARCH_LIST={named}")
    if wish == "1" and not named:
        return Cuda(toolkit, known_to(toolkit, ARCHITECTURES), "FASTKD_CUDA=1")
    gpus = gpus_here()
    if not gpus:
        none = "no GPU of 8.0 or later was seen"
        if wish == "1":
            raise Failure(f"FASTKD_CUDA=1, TORCH_CUDA_ARCH_LIST=native, but {none}")
        if named:
            return Cuda(None, [], f"TORCH_CUDA_ARCH_LIST=native, but {none}")
        return Cuda(None, [], f"{none}, and neither FASTKD_CUDA=1 nor TORCH_CUDA_ARCH_LIST asked for it")
    seen = f"for the GPU seen here ({', '.join(gpus)})"
    return Cuda(toolkit, known_to(toolkit, gpus), missing or seen)


def gpus_here() -> list[str]:
    """The compute capabilities of this machine's GPUs, from 8.0 on, as the driver's own tool tells them."""
    try:
        said = output_of(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
    except (OSError, subprocess.CalledProcessError):
        return []
    found = {line for line in said.split() if re.fullmatch(r"\d+\.\d", line) and float(line) >= 8}
    return sorted(found, key=float)


def cuda_toolkit() -> tuple[Path | None, str]:
    """The folder with bin/nvcc and include/cuda_runtime.h, or why there is none."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc")
    places = [Path(named)] if named else []
    if nvcc and not named:  # it may be a wrapper, so it is asked
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            dry = [nvcc, "-v", "--dryrun", "-x", "cu", os.devnull]
            said = subprocess.run(dry, check=True, text=True, capture_output=True)
            places += [Path(top) for top in re.findall(r"TOP=(.+)", said.stdout + said.stderr)]
        places += [Path(nvcc).resolve().parent.parent, Path(nvcc).parent.parent]
    places += [] if named else [Path("/usr/local/cuda")]
    for place in places:
        if (place / "bin" / "nvcc").is_file() and (place / "include" / "cuda_runtime.h").is_file():
            try:
                output_of([str(place / "bin" / "nvcc"), "--list-gpu-code"])
            except (OSError, subprocess.CalledProcessError) as error:
                return None, f"{place / 'bin' / 'nvcc'} does not run ({error})"
            if static_runtime(place) is None:
                return None, f"{place} has no libcudart_static.a"
            return place.resolve(), ""
    if named:
        return None, f"CUDA_HOME is {named}, but bin/nvcc and include/cuda_runtime.h are not both there"
    if nvcc:
        return None, f"nvcc is {nvcc}, but its include/cuda_runtime.h is missing"
    return None, "no nvcc on PATH, and CUDA_HOME is not set"


def static_runtime(toolkit: Path) -> Path | None:
    found = [*toolkit.glob("lib*/libcudart_static.a"), *toolkit.glob("targets/*/lib/libcudart_static.a")]
    return found[0] if found else None


def known_to(toolkit: Path | None, wanted: list[str]) -> list[str]:
    """The architectures that nvcc knows, or the newest that it does; PTX of the last, for later GPUs."""
    if toolkit is None:
        return []
    codes = re.findall(r"sm_(\d+)(\d)\s", output_of([str(toolkit / "bin" / "nvcc"), "--list-gpu-code"]))
    known = sorted((f"{major}.{minor}" for major, minor in codes), key=float)
    found = [entry for entry in wanted if entry in known] or known[-1:]
    return [*found[:-1], found[-1] + "+PTX"]


def architectures(named: str) -> list[str]:
    """TORCH_CUDA_ARCH_LIST, names replaced by their architectures."""
    entries = [entry for name in re.split(r"[;,\s]+", named) for entry in NAMED.get(name, name).split(";")]
    for entry in entries:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", entry):
            wanted = "a name such as Hopper or something like 8.0;9.0;10.0+PTX"
            raise Failure(f"TORCH_CUDA_ARCH_LIST contains {entry!r}, wanted {wanted}")
    return entries


def gencode(entry: str) -> list[str]:
    """nvcc's flags for one architecture: machine code, and PTX with "+PTX"."""
    number = entry.removesuffix("+PTX").replace(".", "")
    kinds = ["sm", "compute"] if entry.endswith("+PTX") else ["sm"]
    return [f"-gencode=arch=compute_{number},code={kind}_{number}" for kind in kinds]


def release(toolkit: Path) -> str:
    """The version of a CUDA toolkit."""
    found = re.search(r"release ([\d.]+)", output_of([str(toolkit / "bin" / "nvcc"), "--version"]))
    return found.group(1) if found else "?"


class NinjaFile:
    """A build.ninja, in the folder with what it makes. ninja is told which headers a compiler read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: set[str] = set()
        self.text = f"""ninja_required_version = 1.5
builddir = {escaped(folder)}
rule compile
  command = $run -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $run -o $out
"""

    def compile(self, source: str, output: str, command: list[str]) -> str:
        return self._step("compile", [source], output, command)

    def link(self, output: str, command: list[str]) -> str:
        """Needs those words of its command that earlier steps make."""
        return self._step("link", [word for word in command if word in self.made], output, command)

    def _step(self, rule: str, needs: list[str], output: str, command: list[str]) -> str:
        made = str(self.folder / output)
        self.made.add(made)
        self.text += f"build {escaped(made)}: {rule} {' '.join(map(escaped, needs))}\n"
        self.text += f"  run = {shlex.join(command).replace('$', '$$')}\n"
        return made

    def run(self) -> bool:
        """Makes what is not up to date; whether all of it could be made."""
        found = shutil.which("ninja")
        if found is None and importlib.util.find_spec("ninja") is None:
            without = "`pip install ninja`, or leave out --no-build-isolation"
            raise Failure(f"building needs ninja: {without}, or set {PURE}")
        file = self.folder / "build.ninja"
        file.write_text(self.text)
        command = [found] if found else [sys.executable, "-m", "ninja"]
        return subprocess.run([*command, "-f", str(file), "-j", str(jobs())]).returncode == 0


def escaped(path: object) -> str:
    """A path as build.ninja writes it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
