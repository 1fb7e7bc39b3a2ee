"""fastkd on aarch64 from another machine: cross-compiled, and the kernels' tests run by an emulator.

    python tests/packaging/aarch64.py compile        every file of the CPU library: no warning, and vectors
    python tests/packaging/aarch64.py emulate        the library, and its code paths' tests under qemu-user
    python tests/packaging/aarch64.py emulate FILES  the same with other tests, or any arguments of pytest

Needs Debian's g++-aarch64-linux-gnu, and where it is missing says that it is skipped. To emulate takes
qemu-user-static, Debian's package index for arm64 and 2 GB in build/aarch64, where all of it stays for the
next time: a Python for arm64, and PyTorch with empty stand-ins for the CUDA libraries that it names.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "csrc"))
import toolchain  # noqa: E402

CXX = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64-static"
TORCH = "2.11.0"  # its wheel for aarch64 is one that needs the CUDA libraries
PURE = "pytest filelock fsspec jinja2 networkx sympy typing_extensions"
TESTS = ["tests/backends/test_code_paths.py"]
# The emulator cannot start a child process of its own kind; Triton is not there.
LEFT_OUT = "not environment and not amx and not triton"

CONDITION = "eq|ne|cs|cc|mi|pl|vs|vc|hi|ls|ge|lt|gt|le"
BLOCK = re.compile(rf"^\.L\w+:$|^\s+(?:b\.?(?:{CONDITION})?|cbn?z|tbn?z|ret)\s.*$", re.MULTILINE)
FUNCTION = re.compile(r"^(_Z\w+):$(.*?)^\s+\.size\s+\1", re.MULTILINE | re.DOTALL)
LOADS = re.compile(r"\bfcvtl2?\s+v\d+\.4s, v\d+\.[48]h")
STORES = re.compile(r"\bfcvtn2?\s+v\d+\.[48]h, v\d+\.4s")
TILE = re.compile(r"(?:gemm|dot)_tileIf")
SINGLE = re.compile(r"_lanesI\w*4HalfEfE")  # channels that fill no vector: one number at a time


def faults(assembly: str) -> list[str]:
    """What is wrong with a file of kernels: float16 converted by other than the vector instructions, or sums
    of a matrix product that are kept in memory.
    """
    found = []
    for name, body in FUNCTION.findall(assembly):
        of_half = "4HalfE" in name and "4HalfEd" not in name and not SINGLE.search(name) and ".4s" in body
        if of_half and not LOADS.search(body) and not STORES.search(body):
            found.append(f"{name} converts float16 without fcvtl and fcvtn")
        for block in BLOCK.split(body):
            inserts = re.search(r"\bins\s+v\d+\.[sh]\[[123]\]", block)
            if inserts and re.search(r"\bfcvt\s+(?:s\d+, h|h\d+, s)\d+", block):
                found.append(f"{name} converts a vector of float16 number by number")
            if TILE.search(name) and len(re.findall(r"\bfmla\b", block)) > 3 and "[sp" in block:
                found.append(f"{name} keeps sums in memory: too few registers")
    return found


def compile_all() -> None:
    flags = ["-std=c++17", "-DNDEBUG", f"-DTORCH_TARGET_VERSION={toolchain.TARGET_BYTES}", "-Icsrc", "-fPIC"]
    flags += ["-fvisibility=hidden", "-fvisibility-inlines-hidden"]
    flags += ["-Wall", "-Wno-unknown-pragmas", "-Werror", "-isystem", str(toolchain.torch()[0] / "include")]
    flags += ["-DFASTKD_PATH=neon", "-DFASTKD_VECTOR_BYTES=16", '-DFASTKD_BUILD_INFO=""']

    def compiled(file: Path) -> str:
        is_kernels = file.name == "kernels.cpp"
        how = ["-O3", "-S", "-o", "-"] if is_kernels else ["-fsyntax-only"]
        done = subprocess.run([CXX, *flags, *how, str(file)], cwd=ROOT, text=True, capture_output=True)
        if done.returncode:
            raise SystemExit(f"{file}: {done.stderr}")
        return done.stdout

    files = [*(ROOT / "csrc" / "common").glob("*.cpp"), *(ROOT / "csrc" / "cpu").rglob("*.cpp")]
    files.sort(key=lambda file: file.name != "kernels.cpp")
    with ThreadPoolExecutor(toolchain.jobs()) as pool:
        assembly = [text for text in pool.map(compiled, files) if text]
    wrong = [fault for text in assembly for fault in faults(text)]
    counts = [sum(len(pattern.findall(text)) for text in assembly) for pattern in (LOADS, STORES)]
    if wrong or not all(counts):
        raise SystemExit("\n".join(wrong) or "no float16 vector is converted")
    print(
        f"{len(files)} files without a warning; float16 is read by {counts[0]} fcvtl and written by"
        f" {counts[1]} fcvtn"
    )


def run(*command: str | Path, cwd: Path = ROOT, **variables: str) -> str:
    environment = os.environ | variables
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: status {done.returncode}\n{done.stdout}")
    return done.stdout


def unpack_python(top: Path) -> Path:
    """Debian's Python for arm64 with the libraries that it needs, unpacked; nothing is installed."""
    root, state = top / "root", top / "apt"
    if not root.is_dir():
        for folder in ("state/lists/partial", "cache/archives/partial"):
            (state / folder).mkdir(parents=True, exist_ok=True)
        (state / "status").touch()
        (state / "apt.conf").write_text(
            f'APT::Architecture "arm64"; APT::Architectures {{ "arm64"; }}; Dir::State "{state}/state";\n'
            f'Dir::State::status "{state}/status"; Dir::Cache "{state}/cache";\n'
        )
        config = {"APT_CONFIG": str(state / "apt.conf")}
        run("apt-get", "-qq", "update", **config)
        install = "apt-get -qq install -y --download-only --no-install-recommends python3 libstdc++6"
        run(*install.split(), **config)
        for package in (state / "cache" / "archives").glob("*.deb"):
            run("dpkg", "-x", package, top / "root.part")
        (top / "root.part").rename(root)
    return root


def unpack_torch(top: Path, python: str) -> Path:
    """PyTorch and NumPy for aarch64, and what both need of pure Python."""
    site = top / "site"
    if not site.is_dir():
        platforms = [f"--platform=manylinux_{v}_aarch64" for v in ("2_28", "2_27", "2_17")]
        pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
        foreign = ["--only-binary=:all:", "--no-deps", f"--python-version={python}", *platforms]
        part = top / "site.part"
        needs = [f"torch=={TORCH}", "numpy", "nvidia-cuda-runtime>=13,<13.1"]
        run(*pip, "install", "--target", part, *foreign, *needs)
        run(*pip, "install", "--target", part, *PURE.split())
        part.rename(site)
    return site


def make_stand_ins(top: Path, site: Path, root: Path) -> Path:
    """Libraries with the names and functions that PyTorch's own ask for and that are not there."""
    stand_ins = top / "stand-ins"
    if stand_ins.is_dir():
        return stand_ins
    part = top / "stand-ins.part"
    part.mkdir(exist_ok=True)
    shutil.copy(next(site.rglob("libcudart.so.*")), part)  # called while PyTorch is loaded
    asked: dict[str, set[str]] = defaultdict(set)
    names: set[str] = set()
    for library in (site / "torch" / "lib").glob("*.so*"):
        said = run("aarch64-linux-gnu-readelf", "-W", "--dyn-syms", "-d", library)
        names |= set(re.findall(r"NEEDED.*\[(.*)\]", said))
        for function, version in re.findall(r" UND (\w+)(?:@(\S+))?", said):
            asked[version].add(function)
    here = {file.name for folder in (root, site / "torch", part) for file in folder.rglob("*.so*")}
    for name in names - here:
        version = "NVSHMEM" if "nvshmem" in name else name
        stem = re.sub(r"^lib|_.*|\.so.*", "", name).lower()
        unversioned = {function for function in asked[""] if function.lower().startswith(stem)}
        code = "".join(f"void {function}(void) {{}}\n" for function in asked.get(version) or unversioned)
        (part / "functions.c").write_text(code)
        (part / "versions").write_text(f"{version} {{ global: *; }};")
        link = ["-shared", "-w", "-fPIC", f"-Wl,--version-script={part / 'versions'},-soname,{name}"]
        run("aarch64-linux-gnu-gcc", *link, part / "functions.c", "-o", part / name)
    part.rename(stand_ins)
    return stand_ins


def emulate(arguments: list[str]) -> int:
    top = ROOT / "build" / "aarch64"
    top.mkdir(parents=True, exist_ok=True)
    root = unpack_python(top)
    python = max((root / "usr" / "bin").glob("python3.*[0-9]"))
    site = unpack_torch(top, python.name.removeprefix("python"))
    stand_ins = make_stand_ins(top, site, root)
    tree = top / "tree"
    # Without the CUDA kernels, which the tests would compile for this machine's processor.
    tracked = [file for file in run("git", "ls-files").splitlines() if not file.startswith("csrc/cuda/")]
    for file in filter(os.path.isfile, tracked):
        (tree / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, tree / file)
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    said = run(*build, cwd=tree, CXX=f"{CXX} -L{site}/torch/lib", FASTKD_CUDA="0", PYTHONPATH="")
    assert "warning:" not in said, said
    variables = {"LD_LIBRARY_PATH": stand_ins, "PYTHONHOME": root / "usr", "PYTHONPATH": f"{tree}:{site}"}
    settings = [word for name, value in variables.items() for word in ("-E", f"{name}={value}")]
    show = "from fastkd import native as n; print(*n.cpu_paths()); assert n.cpu_path() == 'neon'"
    start = [EMULATOR, "-L", root, *settings, python, "-W", "ignore"]
    print(run(*start, "-c", show, cwd=tree), end="", flush=True)
    command = [*start, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(arguments or TESTS), "-k", LEFT_OUT]
    return subprocess.run([*map(str, command)], cwd=tree).returncode


def main() -> int:
    what, *arguments = sys.argv[1:] or ["compile"]
    if what not in ("compile", "emulate"):
        print(__doc__, file=sys.stderr)
        return 2
    for tool in [CXX] if what == "compile" else [CXX, EMULATOR, "apt-get"]:
        if not shutil.which(tool):
            print(f"{what}: skipped, {tool} is not installed")
            return 0
    if what == "emulate":
        return emulate(arguments)
    compile_all()
    return 0


if __name__ == "__main__":
    sys.exit(main())
