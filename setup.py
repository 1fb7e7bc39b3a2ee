"""Builds fastkd's two libraries; the metadata stands in pyproject.toml.

    fastkd/_C.abi3.so        csrc/cpu, always
    fastkd/_C_cuda.abi3.so   csrc/cuda, where nvcc and the CUDA headers are found (no GPU needed)

Both are plain shared libraries against PyTorch's stable ABI: no Python C API, no C++ symbol of PyTorch, so one file serves every
CPython >= 3.10 and every PyTorch >= 2.11. Compiler and linker are called directly: torch.utils.cpp_extension insists that the CUDA toolkit
be the one PyTorch was built with, which the stable ABI and a static CUDA runtime make pointless, and needs PyTorch imported before pip can
even ask for the package's name.

Switches (environment): FASTKD_BUILD=0|1, FASTKD_CUDA=0|1|auto, MAX_JOBS, TORCH_CUDA_ARCH_LIST, CXX, CXXFLAGS, LDFLAGS, CUDA_HOME.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.editable_wheel import editable_wheel

TORCH_TARGET = "2.11"  # the oldest PyTorch served; TORCH_TARGET_VERSION spells it as bytes, in hexadecimal
FLAGS = ["-O3", "-std=c++17", "-DNDEBUG", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
HOST_FLAGS = ["-fPIC", "-g0", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wall", "-Wno-unknown-pragmas"]
HOST_FLAGS += ["-Wno-unknown-warning-option", "-Wno-maybe-uninitialized"]  # GCC 12 finds its own AVX-512 header uninitialized
ARCHITECTURES = "8.0;9.0;10.0+PTX"
ARCHITECTURE_NAMES = {"Volta": "7.0", "Turing": "7.5", "Ampere": "8.0;8.6", "Ada": "8.9", "Hopper": "9.0", "Blackwell": "10.0;12.0"}
CUDA = "fastkd._C_cuda"
PURE = "FASTKD_BUILD=0 to install without compiling (Triton where there is a GPU, the PyTorch reference on the CPU)"


class Failure(SystemExit):
    """One sentence instead of a traceback: pip shows what stands on stderr."""

    def __init__(self, message: str) -> None:
        super().__init__(f"\nfastkd: {message}.\n")


class CommandFailure(Failure):
    """A compiler or linker failed: not the user's switches, so FASTKD_CUDA=auto may go on without."""


def switch(name: str, default: str, *choices: str) -> str:
    value = os.environ.get(name, default)
    if value not in choices:
        raise Failure(f"{name} is {value!r}, wanted {' or '.join(choices)}")
    return value


def jobs() -> int:
    value = os.environ.get("MAX_JOBS", "") or str(os.cpu_count() or 1)
    if not value.isdigit() or int(value) < 1:
        raise Failure(f"MAX_JOBS is {value!r}, wanted a number from 1 up")
    return int(value)


def run(command: list[str]) -> str:
    """Runs a command; returns what it wrote. OSError or CalledProcessError if it fails."""
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout


def cxx() -> list[str]:
    """The C++ compiler's command: CXX, or the first of the usual names that is there."""
    named = os.environ.get("CXX")
    command = shlex.split(named) if named else [next(filter(shutil.which, ("c++", "g++", "clang++")), "c++")]
    if not shutil.which(command[0]):
        raise Failure(f"no C++ compiler found ({command[0]!r} is not a command); install g++ or clang++, set CXX, or set {PURE}")
    return command


def torch_paths() -> tuple[Path, str]:
    """PyTorch's folder and version, found without importing it (that would take seconds, and pip runs this file several times)."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise Failure(f"building needs torch>={TORCH_TARGET}: install it first, or leave out --no-build-isolation, or set {PURE}")
    folder = Path(spec.submodule_search_locations[0])
    found = re.search(r"__version__\s*=\s*'([^']+)'", (folder / "version.py").read_text())
    version = found.group(1) if found else "0"
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < tuple(map(int, TORCH_TARGET.split("."))):
        raise Failure(f"building needs torch>={TORCH_TARGET}, found {version} in {folder}; upgrade it, or set {PURE}")
    if not (folder / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
        raise Failure(f"torch {version} in {folder} has no C++ headers; install a complete one, or set {PURE}")
    return folder, version


def cuda_toolkit() -> tuple[Path | None, str]:
    """The folder with bin/nvcc and include/cuda_runtime.h, or why there is none. nvcc on PATH may be a wrapper, so it is asked."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc")
    places = [Path(named)] if named else []
    if nvcc and not named:
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            places += [Path(top) for top in re.findall(r"TOP=(.+)", run([nvcc, "-v", "--dryrun", "-x", "cu", os.devnull]))]
        places += [Path(nvcc).resolve().parent.parent, Path(nvcc).parent.parent]
    places += [] if named else [Path("/usr/local/cuda")]
    for place in places:
        if (place / "bin" / "nvcc").is_file() and (place / "include" / "cuda_runtime.h").is_file():
            return place.resolve(), "built"
    if named:
        return None, f"CUDA_HOME is {named}, but bin/nvcc and include/cuda_runtime.h are not both there"
    return None, f"nvcc is {nvcc}, but its include/cuda_runtime.h is missing" if nvcc else "no nvcc on PATH, and CUDA_HOME is not set"


def cuda_plan() -> tuple[Path | None, str]:
    """The toolkit to build the CUDA library with, after FASTKD_CUDA; or None and the reason for none."""
    wish = switch("FASTKD_CUDA", "auto", "0", "1", "auto")
    toolkit, note = (None, "FASTKD_CUDA=0") if wish == "0" else cuda_toolkit()
    if toolkit is None and wish == "1":
        raise Failure(f"FASTKD_CUDA=1, but no CUDA toolkit: {note}")
    return toolkit, note


def cuda_architectures(nvcc: str) -> list[str]:
    """The -gencode flags of TORCH_CUDA_ARCH_LIST, or of those of the default list that this nvcc knows."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    entries: list[str] = []
    for entry in re.split(r"[;,\s]+", (wanted or ARCHITECTURES).strip()):
        name = entry.removesuffix("+PTX")
        entries += ARCHITECTURE_NAMES.get(name, name).split(";")
        entries[-1] += entry[len(name) :]
    if not wanted:
        known = run([nvcc, "--list-gpu-code"]).split()
        entries = [e for e in entries if "sm_" + e.removesuffix("+PTX").replace(".", "") in known] or ["8.0"]
        entries[-1] = entries[-1].removesuffix("+PTX") + "+PTX"  # the newest is what later GPUs translate from
    flags = []
    for entry in entries:
        found = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", entry)
        if not found:
            raise Failure(f"TORCH_CUDA_ARCH_LIST contains {entry!r}, wanted something like 8.0;9.0;10.0+PTX")
        number = found.group(1) + found.group(2)
        flags += [f"-gencode=arch=compute_{number},code={kind}_{number}" for kind in ("sm", "compute") if kind == "sm" or found.group(3)]
    return flags


def kernel_resources(log: str) -> list[list[str | int]]:
    """What ptxas says of each kernel: [mangled name, "sm_90", registers, bytes of stack, bytes spilled, bytes of static shared memory]."""
    resources: list[list[str | int]] = []
    for part in log.split("Compiling entry function")[1:]:
        name, code = re.findall(r"'([^']+)'", part)[:2]
        stack, stores, loads = map(int, re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", part))
        registers, shared = re.search(r"Used (\d+) registers", part), re.search(r"(\d+) bytes smem", part)
        resources.append([name, code, int(registers[1]) if registers else -1, stack, stores + loads, int(shared[1]) if shared else 0])
    return resources


class BuildLibraries(build_ext):
    """Compiles only what changed, MAX_JOBS files at a time, and links each library."""

    extensions: list[Extension]

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".abi3.so"

    def build_extensions(self) -> None:
        self.cxx, (self.torch, self.torch_version) = cxx(), torch_paths()
        compiler = run([*self.cxx, "--version"]).splitlines()[0]
        self.facts = {"torch_target": TORCH_TARGET, "torch_headers": self.torch_version, "compiler": compiler}
        toolkit, note = cuda_plan()
        # CUDA comes first, so that the CPU library can say why there is no other one.
        for extension in sorted(self.extensions, key=lambda e: e.name != CUDA):
            if extension.name != CUDA:
                self.build(extension, {**self.facts, "cuda": note})
            elif toolkit is not None:
                try:
                    self.build_cuda(extension, toolkit)
                except CommandFailure as error:
                    if os.environ.get("FASTKD_CUDA") == "1":
                        raise
                    toolkit, note = None, f"nvcc in {toolkit} failed"
                    print(f"{error}fastkd: going on without the CUDA library (FASTKD_CUDA=1 makes this an error).", file=sys.stderr)
            if extension.name == CUDA and toolkit is None:
                print(f"fastkd: no CUDA library: {note}.", file=sys.stderr)
        self.extensions = [e for e in self.extensions if e.name != CUDA or toolkit is not None]

    def build_cuda(self, extension: Extension, toolkit: Path) -> None:
        nvcc = str(toolkit / "bin" / "nvcc")
        try:
            architectures = cuda_architectures(nvcc)
            release = re.search(r"release ([\d.]+)", run([nvcc, "--version"]))
        except (OSError, subprocess.CalledProcessError) as error:
            raise CommandFailure(f"{nvcc} does not run ({error})") from None
        compiler = [nvcc, *architectures, "--threads", str(jobs()), "-DUSE_CUDA"]
        compiler += ["-ccbin", [part for part in self.cxx if part[0] != "-"][-1]] if os.environ.get("CXX") else []
        # The library must say that it needs libtorch_cuda.so, also where PyTorch has none: an empty library of that name stands in.
        stub = Path(self.build_temp) / "libtorch_cuda.so"
        stub.parent.mkdir(parents=True, exist_ok=True)
        self.command([*self.cxx, "-shared", "-Wl,-soname,libtorch_cuda.so", "-x", "c++", os.devnull, "-o", str(stub)])
        libraries = ["-L" + str(stub.parent), "-Wl,--no-as-needed", "-ltorch_cuda", "-Wl,--as-needed"]
        # The static runtime serves whichever CUDA PyTorch brings. Linking is not left to nvcc: it would leave this machine's paths behind.
        runtime = [str(file.parent) for pattern in ("lib*", "targets/*/lib") for file in toolkit.glob(f"{pattern}/libcudart_static.a")]
        libraries += [*(f"-L{folder}" for folder in runtime[:1]), "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        codes = [flag.rsplit("=", 1)[1] for flag in architectures]
        self.build(extension, {**self.facts, "toolkit": release.group(1) if release else "?", "architectures": codes}, compiler, libraries)

    def build(self, extension: Extension, facts: dict[str, object], nvcc: Sequence[str] = (), libraries: Sequence[str] = ()) -> None:
        """Compiles and links one library; `nvcc` is the command for its .cu files, `libraries` what it needs beyond libtorch_cpu."""
        include = self.torch / "include"
        # Paths of the build machine do not belong in error messages, nor in the reason why two builds differ.
        host = [*HOST_FLAGS, f"-fmacro-prefix-map={include}/=", *shlex.split(os.environ.get("CXXFLAGS", ""))]
        search = ["-isystem", str(include), "-Icsrc"]
        headers = [path for path in Path("csrc").rglob("*.*") if path.suffix in (".h", ".inl", ".cuh")]
        newest = max((path.stat().st_mtime for path in headers), default=0.0)

        def compile_one(source: str, *defines: str) -> str:
            target = Path(self.build_temp) / extension.name / (source + ".o")
            if source.endswith(".cu"):
                command = [*nvcc, "-Xptxas=-v", *FLAGS, *(f"-Xcompiler={flag}" for flag in host), *search, "-c", source, "-o", str(target)]
            else:
                own = [*defines, *(["-DUSE_CUDA"] if nvcc else [])]
                command = [*self.cxx, *FLAGS, *host, *own, *search, "-c", source, "-o", str(target)]
            # Isolated builds have PyTorch in a new folder each time, so its version stands for it.
            stamp, record = target.with_suffix(".txt"), f"{self.torch_version} {command}".replace(str(self.torch), "TORCH")
            fresh = target.exists() and target.stat().st_mtime > max(newest, os.stat(source).st_mtime)
            if self.force or not fresh or not stamp.exists() or stamp.read_text() != record:
                target.parent.mkdir(parents=True, exist_ok=True)
                stamp.unlink(missing_ok=True)
                target.with_suffix(".log").write_text(self.command(command))
                stamp.write_text(record)
            return str(target)

        *sources, build_info = sorted(extension.sources, key=lambda source: source.endswith("build_info.cpp"))
        with ThreadPoolExecutor(jobs()) as pool:
            objects = list(pool.map(compile_one, sources))
        if nvcc:
            facts = {
                **facts,
                "kernels": [line for made in objects for line in kernel_resources(Path(made).with_suffix(".log").read_text())],
            }
        objects.append(compile_one(build_info, f"-DFASTKD_BUILD_INFO={json.dumps(json.dumps(facts))}"))
        output = Path(self.get_ext_fullpath(extension.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        output.unlink(missing_ok=True)  # a process that has the old one mapped keeps it
        names = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-L" + str(self.torch / "lib"), "-ltorch_cpu"]
        strip = ["-Wl,-x"] if sys.platform == "darwin" else ["-Wl,-s", "-Wl,--exclude-libs,ALL", "-Wl,--as-needed"]
        names += [*libraries, *shlex.split(os.environ.get("LDFLAGS", ""))]
        self.command([*self.cxx, "-shared", *objects, *strip, *names, "-o", str(output)])

    def command(self, command: list[str]) -> str:
        print(shlex.join(command), flush=True)
        done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        print(done.stdout, end="", flush=True)
        if done.returncode:
            raise CommandFailure(f"{command[0]} failed (its messages stand above); mend it, or set {PURE}")
        return done.stdout


class EditableWheel(editable_wheel):
    """An editable install loads the libraries beside the sources: remove those of an earlier one, which this one may not make anew."""

    def run(self) -> None:
        for library in Path("fastkd").glob("_C*.so"):
            library.unlink()
        super().run()


def main() -> None:
    # Windows has neither of the two compilers the kernels are written for.
    compiled = switch("FASTKD_BUILD", "0" if sys.platform == "win32" else "1", "0", "1") == "1"
    folders = {"fastkd._C": "csrc/cpu", CUDA: "csrc/cuda"}
    # what lies in csrc itself is compiled into each library, for its kind of device
    sources = {
        name: [str(file) for part in ("csrc", folder) for file in sorted(Path(part).iterdir()) if file.suffix in (".cpp", ".cu")]
        for name, folder in folders.items()
    }
    extensions = [Extension(name, files, py_limited_api=True) for name, files in sources.items()]
    if compiled and {"bdist_wheel", "editable_wheel", "build", "build_ext"} & set(sys.argv):
        cxx(), torch_paths(), cuda_plan(), jobs()  # what cannot be built says so before anything is written
    setup(
        ext_modules=extensions if compiled else [],
        cmdclass={"build_ext": BuildLibraries, "editable_wheel": EditableWheel},
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if compiled else {},
    )


main()
