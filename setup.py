"""Builds fastkd's two libraries; the metadata stands in pyproject.toml, csrc/toolchain.py finds the tools.

    fastkd/_C.abi3.so        csrc/cpu, always
    fastkd/_C_cuda.abi3.so   csrc/cuda, where a GPU is seen, FASTKD_CUDA=1 or TORCH_CUDA_ARCH_LIST asks for it

Both use PyTorch's stable ABI: one file serves every CPython >= 3.10 and every PyTorch >= 2.11. ninja calls
the compilers directly, since PyTorch's own builder insists on the CUDA toolkit that PyTorch was built with.

Environment: FASTKD_BUILD, FASTKD_CUDA, MAX_JOBS, TORCH_CUDA_ARCH_LIST, CXX, CXXFLAGS, LDFLAGS, CUDA_HOME.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import setuptools

if int(setuptools.__version__.split(".")[0]) < 77:
    need = f"\nfastkd: building needs setuptools>=77, found {setuptools.__version__}"
    raise SystemExit(f"{need}: `pip install -U setuptools`, or leave out --no-build-isolation.\n")

from setuptools.command.build_ext import build_ext
from setuptools.command.editable_wheel import editable_wheel

sys.path.insert(0, str(Path(__file__).parent / "csrc"))
import toolchain

FLAGS = ["-O3", "-std=c++17", "-DNDEBUG", "-Icsrc"]
HOST_FLAGS = ["-fPIC", "-g0", "-fvisibility=hidden", "-fvisibility-inlines-hidden"]
HOST_FLAGS += ["-Wall", "-Wno-unknown-pragmas"]
Words = Sequence[str]
ELF = ["-Wl,-s", "-Wl,--exclude-libs,ALL", "-Wl,--as-needed"]
MAC = ["-Wl,-x", "-undefined", "dynamic_lookup"]


class Libraries(toolchain.NinjaFile):
    """How the two libraries are made, in a folder that keeps what was compiled."""

    def __init__(self, folder: Path, cuda: toolchain.Cuda) -> None:
        super().__init__(folder)
        self.cxx, compiler, self.code_paths = toolchain.cxx()
        torch, version = toolchain.torch()
        # Isolated builds have PyTorch in a new folder each time: under this name ninja finds nothing new.
        self.torch = folder / f"torch-{version}"
        folder.mkdir(parents=True, exist_ok=True)
        self.torch.unlink(missing_ok=True)
        self.torch.symlink_to(torch, target_is_directory=True)
        self.facts = {"torch_target": toolchain.TORCH_TARGET, "torch_headers": version, "compiler": compiler}
        self.library("_C", "csrc/cpu", {} if cuda.toolkit else {"cuda": cuda.why})
        if cuda.toolkit:
            self.cuda_library(cuda, cuda.toolkit)

    def cuda_library(self, cuda: toolchain.Cuda, toolkit: Path) -> None:
        gencode = [flag for entry in cuda.architectures for flag in toolchain.gencode(entry)]
        nvcc = [str(toolkit / "bin" / "nvcc"), *gencode, "-DUSE_CUDA"]
        nvcc += ["-ccbin", [part for part in self.cxx if part[0] != "-"][-1]] if os.environ.get("CXX") else []
        # It must say that it needs libtorch_cuda.so, also where PyTorch has none: an empty one stands in.
        empty = [*self.cxx, "-shared", "-Wl,-soname,libtorch_cuda.so", "-x", "c++", os.devnull]
        stand_in = self.link("libtorch_cuda.so", empty)
        # The static runtime serves whichever CUDA PyTorch brings; nvcc's linking would leave its path.
        runtime = [str(toolchain.static_runtime(toolkit)), "-ldl", "-lrt", "-lpthread"]
        links = ["-Wl,--no-as-needed", stand_in, "-Wl,--as-needed", *runtime]
        codes = [flag.rsplit("=", 1)[1] for flag in gencode]
        facts = {"toolkit": toolchain.release(toolkit), "architectures": codes, "built": cuda.why}
        self.library("_C_cuda", "csrc/cuda", facts, nvcc, links)

    def library(self, name: str, part: str, facts: dict, nvcc: Words = (), links: Words = ()) -> None:
        # Paths of the build machine do not belong in error messages, nor in the reason why two builds differ.
        host = [*HOST_FLAGS, f"-fmacro-prefix-map={self.torch}/include/=", *toolchain.words("CXXFLAGS")]
        torch = ["-isystem", f"{self.torch}/include", f"-DTORCH_TARGET_VERSION={toolchain.TARGET_BYTES}"]
        kernels = [*self.cxx, *FLAGS, *HOST_FLAGS, *toolchain.words("CXXFLAGS")]  # know nothing of PyTorch
        cxx = [*self.cxx, *FLAGS, *host, *torch, *(["-DUSE_CUDA"] if nvcc else [])]
        nvcc = [*nvcc, *FLAGS, *torch, *(f"-Xcompiler={flag}" for flag in host)]
        info, objects = json.dumps(json.dumps({**self.facts, **facts})), []
        for source in sources(part):
            if Path(source).name == "kernels.cpp":
                for path, size in self.code_paths.items():
                    own = [f"-DFASTKD_PATH={path}", f"-DFASTKD_VECTOR_BYTES={size}"]
                    objects.append(self.compile(source, f"{name}/{source}.{path}.o", [*kernels, *own]))
                continue
            command = [*(nvcc if source.endswith(".cu") else cxx)]
            command += [f"-DFASTKD_BUILD_INFO={info}"] if source.endswith("build_info.cpp") else []
            objects.append(self.compile(source, f"{name}/{source}.o", command))
        torch = MAC if sys.platform == "darwin" else [*ELF, f"-L{self.torch}/lib", "-ltorch_cpu"]
        command = [*self.cxx, "-shared", *objects, *torch, *links, *toolchain.words("LDFLAGS")]
        self.link(f"{name}.abi3.so", command)


def sources(part: str) -> list[str]:
    """Of one library, with what both share. Kernels take longest to compile and come first."""
    files = [file for place in (part, "csrc/common") for file in sorted(Path(place).rglob("*.c*"))]
    files.sort(key=lambda file: file.name != "kernels.cpp")
    return [str(file) for file in files if file.suffix in (".cpp", ".cu")]


class BuildLibraries(build_ext):
    extensions: list[setuptools.Extension]

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".abi3.so"

    def build_extensions(self) -> None:
        # an editable install's own folder is deleted, with what was compiled in it
        folder = Path("build/editable" if self.editable_mode else self.build_temp)
        cuda = toolchain.cuda()
        made = Libraries(folder, cuda).run()
        if not made and cuda.toolkit and os.environ.get("FASTKD_CUDA", "auto") == "auto":
            cuda = toolchain.Cuda(None, [], f"nvcc in {cuda.toolkit} failed")
            made = Libraries(folder, cuda).run()
        if not made:
            raise toolchain.Failure(f"compiling failed, as said above; mend it, or set {toolchain.PURE}")
        self.extensions = [e for e in self.extensions if cuda.toolkit or e.name == "fastkd._C"]
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copy2(folder / target.name, target.with_suffix(".new"))
            os.replace(copy, target)  # a process that has the old one mapped keeps it


class EditableWheel(editable_wheel):
    """Libraries of an earlier install beside the sources go: this one may not make them anew."""

    def run(self) -> None:
        for library in Path("fastkd").glob("_C*.so"):
            library.unlink()
        super().run()


def main() -> None:
    # Windows has neither of the two compilers the kernels are written for.
    compiled = toolchain.switch("FASTKD_BUILD", "0" if sys.platform == "win32" else "1", "0", "1") == "1"
    if compiled and {"bdist_wheel", "editable_wheel", "build", "build_ext"} & set(sys.argv):
        toolchain.cxx(), toolchain.torch(), toolchain.cuda(), toolchain.jobs()  # says at once what is missing
    parts = {"fastkd._C": "csrc/cpu", "fastkd._C_cuda": "csrc/cuda"} if compiled else {}
    libraries = [setuptools.Extension(name, sources(parts[name]), py_limited_api=True) for name in parts]
    setuptools.setup(
        ext_modules=libraries,
        cmdclass={"build_ext": BuildLibraries, "editable_wheel": EditableWheel},
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if compiled else {},
        # what pip installs into an isolated build; nothing where nothing is compiled
        setup_requires=["torch>=2.11", "ninja"] if compiled and "egg_info" in sys.argv else [],
    )


main()
