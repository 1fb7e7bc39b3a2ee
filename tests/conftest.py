"""Fresh random inputs in every run, and uninitialised memory that shows."""

from __future__ import annotations

import gc
import os
import random
import zlib
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from seed import SEED

if not torch.cuda.is_available():  # nothing else reads it: inductor's kernels for a CPU are C++
    # Triton asks for this when a kernel is imported: without a GPU its kernels run on a CPU, interpreted
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(pluginmanager: pytest.PytestPluginManager) -> None:
    pluginmanager.import_plugin("speed.plugin")  # --benchmark, for pytest without a path too
    pluginmanager.import_plugin("temporary_folder")


# a worker of pytest-xdist has its share of the threads: two that wait for each other on one core take longer
# than one
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    torch.set_num_threads(share := max(1, torch.get_num_threads() // workers))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(share))  # of one alone no processes are made


# long files of tests, which begin before all others
LONGEST = (
    "test_triton_compile.py",
    "test_adding.py",
    "test_distributed.py",
    "test_processes.py",
    "test_together.py",
    "test_resume.py",
    "test_training.py",
)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The whole suite runs in as many processes as there are CPUs, where pytest-xdist is there; ``-n 0``
    takes one process.

    What is asked for by name runs in one process, and so do the benchmarks where they measure, and all where
    there is a GPU.
    """
    option = config.option
    measures = getattr(option, "benchmark_full", False) or getattr(option, "benchmark_only", False)
    if hasattr(config, "workerinput") or "PYTEST_XDIST_WORKER" in os.environ:
        return  # one of those processes, or a run that one of their tests starts
    whole = (
        config.args_source is pytest.Config.ArgsSource.TESTPATHS
        and not option.keyword
        and not option.markexpr
    )
    if (
        getattr(option, "numprocesses", 0) is None
        and whole
        and not (measures or option.usepdb or option.collectonly)
    ):
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if cpus > 1 and not torch.cuda.is_available():
            # a file's tests in one process, since they share what they compile; files in their order, the
            # longest are not the last
            option.numprocesses, option.dist, option.loadscopereorder = min(cpus, 8), "loadfile", False
    if getattr(option, "numprocesses", 0):
        os.environ["FASTKD_TEST_SEED"] = str(SEED)  # for all processes


INTEROP = ("timm", "torchvision", "accelerate", "lightning", "torchdistill")
"""The packages of the extra ``interop``: each is a fixture, and who takes one has the mark of that name."""


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("FASTKD_INTEROP") and (missing := [name for name in INTEROP if not find_spec(name)]):
        raise pytest.UsageError(f"FASTKD_INTEROP is set, but {', '.join(missing)} cannot be imported")


def pytest_itemcollected(item: pytest.Item) -> None:
    if not {*INTEROP}.isdisjoint(getattr(item, "fixturenames", ())):
        item.add_marker("interop")


def pytest_report_header(config: pytest.Config) -> str:
    return f"fastkd: inputs drawn from FASTKD_TEST_SEED={SEED}, torch {torch.__version__}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]):
    if hasattr(config, "workerinput"):  # lest one process end with one of them alone
        place = {name: i for i, name in enumerate(LONGEST)}
        items.sort(key=lambda item: place.get(item.path.name, len(place)))


def pytest_collection_finish(session: pytest.Session):
    """A module's ``beforehand()`` starts what its tests will wait for, and returns what ends it."""
    gc.freeze()  # ten thousand tests stay: the garbage collector need not look through them again and again
    if session.config.option.collectonly or hasattr(session.config, "workerinput"):
        return  # of several processes each has collected all tests, and one will run the module's
    for module in {getattr(item, "module", None) for item in session.items}:
        if hasattr(module, "beforehand"):
            session.config.add_cleanup(module.beforehand())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    report = yield
    if report.skipped and item.get_closest_marker("interop") and os.environ.get("FASTKD_INTEROP"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"FASTKD_INTEROP is set, but this is skipped: {reason}"
    if report.failed:
        how = f"repeat with FASTKD_TEST_SEED={SEED} and this test alone: each test has inputs of its own"
        report.sections.append(("fastkd seed", how))
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """The CUDA library serves fewer switches than the grids have: what it refuses is skipped
    (tests/backends/test_cuda.py holds what it serves).
    """
    from fastkd import BackendError

    try:
        return (yield)
    except BackendError as error:
        if (
            getattr(item, "callspec", None)
            and item.callspec.params.get("backend") == "cuda"
            and "cannot serve the call" in str(error)
        ):
            pytest.skip(str(error))
        raise


@pytest.fixture(autouse=True)
def fresh_seed(request: pytest.FixtureRequest):
    """Every test draws from the session's seed and its own name, so one test can be repeated alone."""
    seed = SEED ^ zlib.crc32(request.node.nodeid.split("/")[-1].encode())
    random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest):
    """In deterministic mode PyTorch fills what `empty` returns with NaN, for Python and for the C++ kernels
    alike.
    """
    if request.node.get_closest_marker("unpoisoned"):
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


def pytest_generate_tests(metafunc: pytest.Metafunc):
    if "triton" in metafunc.fixturenames:
        from support import KERNELS

        metafunc.parametrize("triton", KERNELS[1:2], indirect=True)  # with the marks of where it runs


@pytest.fixture
def triton(request: pytest.FixtureRequest):
    """Triton serves every call; puts a tensor where its kernels run."""
    from support import place

    import fastkd

    with fastkd.use_backend("triton"):
        yield lambda x: place(x, "triton")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The Triton kernels that were launched."""
    from fastkd.kernels.common.launch import Launch

    names: list[str] = []
    run = Launch.__call__
    monkeypatch.setattr(
        Launch, "__call__", lambda self, *args: (names.append(self.kernel.__name__), run(self, *args))[1]
    )
    return names


def _package(name: str):
    @pytest.fixture(name=name)
    def package():
        return pytest.importorskip(name)

    return package


timm, torchvision, accelerate, lightning, torchdistill = map(_package, INTEROP)


@pytest.fixture
def one_thread():
    """Small tensors gain nothing from a second thread, and on a busy machine every handover waits for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def set_threads():
    """``torch.set_num_threads``; the number before comes back."""
    threads = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(threads)


@pytest.fixture
def cpp() -> str:
    """The compiled CPU kernels; a test that asks for them is skipped where they are not built."""
    from support import cpp_missing

    reason = cpp_missing()
    if reason:
        pytest.skip(f"backend cpp: {reason}")
    return "cpp"


@pytest.fixture
def memory_plan(cpp):
    """``native.set_memory_plan``; the plan before comes back."""
    from fastkd import native

    before = native.memory_plan()
    yield native.set_memory_plan
    native.set_memory_plan(before)


@pytest.fixture
def each_path():
    """The code paths of the CPU library that this processor has, one after the other."""
    from fastkd import native

    if not native.CPU.available:
        pytest.skip(native.CPU.reason)
    before = native.cpu_path()

    def paths():
        for path in native.cpu_paths():
            native.set_cpu_path(path)
            yield path

    yield paths()
    native.set_cpu_path(before)


@pytest.fixture
def small_main(monkeypatch: pytest.MonkeyPatch, one_thread):
    """``train.py``'s main on 64 digits; its flags must choose digits."""
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent))
    from support_data import small_digits

    from fastkd import data as datasets

    monkeypatch.setattr(datasets, "_LOADERS", dict(datasets._LOADERS))
    small_digits()
    import train

    return train.main


@pytest.fixture(scope="module")
def nursery():
    """Starts the command in processes that can be killed."""
    if not hasattr(os, "fork"):
        pytest.skip("no fork on this system")
    from runs import Nursery

    found = Nursery()
    yield found
    found.end()


@pytest.fixture(scope="module")
def group():
    """Starts groups of processes."""
    from runs import Group

    found = Group()
    yield found
    found.end()
