"""``pytest --benchmark``. The conftest.py of tests/ and of benchmarks/ load it, so the option is known
whatever is asked for.

An ordinary run calls each benchmark once, on small shapes. ``--benchmark`` (or pytest-benchmark's
``--benchmark-only``) runs nothing else than the benchmarks, on the full ones. All options of pytest-benchmark
keep their meaning; its own table is printed when one of the options that shape it is given.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from speed.session import Session

SESSION = pytest.StashKey["Session"]()
# of --benchmark-...: these ask for no table
SAVING = ("json", "save", "autosave", "storage", "only", "results", "disable-gc")


def _full(config: pytest.Config) -> bool:
    return config.getoption("benchmark_full") or config.getoption("benchmark_only", False)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmark")
    group.addoption(
        "--benchmark",
        dest="benchmark_full",
        action="store_true",
        help="Run the speed comparisons of benchmarks/ only.",
    )
    group.addoption(
        "--benchmark-results",
        metavar="DIR",
        type=lambda text: Path(os.path.expanduser(text)),
        help="Write speed.json into DIR, after each group.",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    options = config.option
    plugins = config.pluginmanager
    if not plugins.hasplugin("benchmark") and not plugins.hasplugin("pytest_benchmark"):
        from speed import stand_in

        plugins.register(stand_in, "speed.stand_in")
        config.addinivalue_line("markers", "benchmark: how pytest-benchmark measures, where it is installed")
    if not _full(config):
        if hasattr(options, "benchmark_disable"):
            options.benchmark_disable = True  # each body once; --benchmark-enable has the last word
        return
    if getattr(options, "benchmark_disable", False):
        raise pytest.UsageError(
            "--benchmark measures and --benchmark-disable does not: leave out one of them"
        )
    # the latter: a worker of pytest-xdist
    if getattr(options, "numprocesses", None) or hasattr(config, "workerinput"):
        raise pytest.UsageError("--benchmark measures one thing at a time, in one process: leave out -n")
    if config.args_source is pytest.Config.ArgsSource.TESTPATHS:
        config.args = ["benchmarks"]
    given = [
        argument.removeprefix("--benchmark-")
        for argument in config.invocation_params.args
        if argument.startswith("--benchmark-")
    ]
    if not any(option.partition("=")[0] not in SAVING for option in given):
        options.benchmark_quiet = True


def session_of(config: pytest.Config) -> Session:
    if SESSION not in config.stash:
        from speed.session import Session, save  # imports torch, which most options of pytest do without

        def say(line: str) -> None:
            reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
            capture: Any = config.pluginmanager.get_plugin("capturemanager")
            if reporter and capture:
                with capture.global_and_fixture_disabled():
                    # the reporter would write the file's name again after each line
                    writer = config.get_terminal_writer()
                    if writer.width_of_current_line:
                        writer.line()
                    writer.line(line, flush=True)

        def keep(session: Session) -> None:
            folder = config.getoption("benchmark_results")
            if folder:  # whatever stops the run
                save(_result(session, config), folder)

        config.stash[SESSION] = Session(_full(config), say, keep)
    return config.stash[SESSION]


def _result(session: Session, config: pytest.Config) -> dict[str, Any]:
    return session.result([Path(sys.argv[0]).name, *config.invocation_params.args])


@pytest.fixture(scope="session")
def speed(request: pytest.FixtureRequest) -> Session:
    """The run, which measures."""
    return session_of(request.config)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not _full(config):
        return
    kept = [item for item in items if "benchmark" in getattr(item, "fixturenames", ())]
    dropped = [item for item in items if item not in set(kept)] if len(kept) < len(items) else []
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


def pytest_report_teststatus(report: pytest.TestReport, config: pytest.Config) -> tuple[str, str, str] | None:
    """No dots between the lines that say how far the measuring has come."""
    return ("passed", "", "PASSED") if _full(config) and report.when == "call" and report.passed else None


def _complete(config: pytest.Config, exitstatus: int) -> bool:
    """Whether all that belongs to a full run was run."""
    asked = config.args_source is pytest.Config.ArgsSource.TESTPATHS or config.args == ["benchmarks"]
    return asked and exitstatus in (0, 1) and not (config.option.keyword or config.option.markexpr)


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    session = config.stash.get(SESSION, None)
    if session is None:
        return
    session.close()
    if not session.records:
        return
    from speed.session import save, summary

    result = _result(session, config)
    terminalreporter.section("speed")
    for line in summary(result):
        terminalreporter.write_line(line)
    folder = config.getoption("benchmark_results")
    if folder or _complete(config, exitstatus):
        terminalreporter.write_line("")
        terminalreporter.write_line(save(result, folder))
