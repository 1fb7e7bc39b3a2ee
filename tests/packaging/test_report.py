"""``python -m fastkd`` tells the truth about this machine."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from unittest import mock

import pytest
import torch
from child_process import python

import fastkd
from fastkd import backends, native

RUN = "import runpy; runpy.run_module('fastkd', run_name='__main__')"


def run(*flags: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """The module as it runs by ``-m``, after some lines."""
    interpret = os.environ.get("TRITON_INTERPRET", "0")  # as in this process, whose answers are compared
    return python(f"{before}\n{RUN}", *flags, TRITON_INTERPRET=interpret)


@pytest.fixture(scope="module")
def report() -> dict:
    environment = {**os.environ, "PYTHONPATH": str(Path(fastkd.__file__).parent.parent)}
    command = [sys.executable, "-W", "ignore", "-m", "fastkd", "--json"]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("arguments", [["--json"], []])
def test_a_reader_that_goes_away_is_no_error(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # as ``| head`` does once it has read enough
    with os.fdopen(writer, "wb") as closed:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "fastkd", *arguments],
            env={**os.environ, "PYTHONPATH": str(Path(fastkd.__file__).parent.parent)},
            stdout=closed,
            stderr=subprocess.PIPE,
            timeout=300,
        )
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("flag", ["--help", "--wrong"])
def test_flags_are_looked_at_before_the_report_is_made(flag: str, monkeypatch, capsys) -> None:
    from fastkd import __main__ as module

    monkeypatch.setattr(module, "report", lambda: pytest.fail("the report was made"))
    monkeypatch.setattr(sys, "argv", ["fastkd", flag])
    with pytest.raises(SystemExit) as ended:
        module.main()
    told = capsys.readouterr()
    assert ended.value.code == (0 if flag == "--help" else 2)
    assert "--json" in told.out if flag == "--help" else "--wrong" in told.err


def test_versions(report: dict) -> None:
    assert report["fastkd"] == fastkd.__version__
    assert report["python"] == platform.python_version()
    assert report["torch"] == torch.__version__
    assert report["cuda"]["torch"] == torch.version.cuda
    assert bool(report["cuda"]["devices"]) == torch.cuda.is_available()


def test_triton(report: dict) -> None:
    try:
        import triton
    except ImportError:
        assert report["triton"] is None
    else:
        assert report["triton"] == triton.__version__
    unknown = """
        import importlib.metadata
        known = importlib.metadata.version
        def version(name):
            if name == "triton":
                raise importlib.metadata.PackageNotFoundError(name)
            return known(name)
        importlib.metadata.version = version
    """
    found = json.loads(run("--json", before=textwrap.dedent(unknown)).stdout)
    assert found["triton"] == ("unknown" if report["triton"] else None)
    without = run("--json", before="import sys; sys.modules['triton'] = None")
    assert json.loads(without.stdout)["triton"] is None


def test_native(report: dict) -> None:
    for key, library in (("cpu", native.CPU), ("cuda", native.CUDA)):
        entry = report["native"][key]
        assert (entry["available"], entry["reason"], entry["path"]) == (
            library.available,
            library.reason,
            library.path,
        )
    if native.CPU.available:
        assert report["native"]["cpu"]["torch_target"] == "2.11"
        assert report["native"]["cpu"]["code_paths"] == native.cpu_paths()
        assert report["native"]["cpu"]["code_path"] in native.cpu_paths()
        assert report["native"]["cpu"]["amx"] == native.amx()


def test_backends(report: dict) -> None:
    with mock.patch.object(native, "EMULATED", None):  # by this process's tests alone
        wanted = {
            name: {"available": available, "reason": reason}
            for name, (available, reason) in backends.availability().items()
        }
    assert report["backends"] == wanted
    assert {"reference", "cpp", "triton", "cuda"} <= wanted.keys()
    assert all(entry["reason"] for entry in wanted.values())
    assert report["backends"]["cpp"]["available"] == native.CPU.available


def test_a_pytorch_without_cuda() -> None:
    none = "import torch; torch.version.cuda = None; torch.cuda.is_available = lambda: False"
    done = run("--json", before=none)
    report = json.loads(done.stdout)
    assert report["cuda"] == {"torch": None, "devices": []}
    assert not report["native"]["cuda"]["available"]
    assert "without CUDA" in report["native"]["cuda"]["reason"]
    assert not report["backends"]["cuda"]["available"]


def test_text_says_the_same(report: dict) -> None:
    done = run()
    assert done.returncode == 0, done.stderr
    assert f"fastkd {report['fastkd']}, Python {report['python']}, torch {report['torch']}" in done.stdout
    # an entry's reason may go on in the lines below it, which stand further in; details follow it there
    entries = [" ".join(text.split()) for text in re.split(r"\n(?=  \S)|\n\n", done.stdout)]
    for name, entry in [*report["native"].items(), *report["backends"].items()]:
        said = f"{name} {'yes' if entry['available'] else 'no'} {entry['reason']}"
        assert sum(f"{text} ".startswith(f"{said} ") for text in entries) == 1, said


def test_wrong_flag() -> None:
    done = run("--yaml")
    assert done.returncode == 2
    assert "--yaml" in done.stderr


def test_a_long_reason_goes_on_in_the_next_line() -> None:
    from fastkd.__main__ import _entry

    words = "triton 3.8.0 is installed, but PyTorch sees no CUDA device (" + "interpreted " * 4 + "slowly)"
    lines = _entry("triton", {"available": False, "reason": words})
    assert lines[0].startswith("  triton     no   triton 3.8.0") and len(lines) == 2
    assert max(map(len, lines)) <= 100 and " ".join(line.strip() for line in lines).endswith(words)
    assert _entry("cpu", {"available": True, "reason": "loaded " + "x" * 200})[-1].strip() == "x" * 200
