"""Processes of tests that do not end, or lose the one that they are forked from, leave what happened."""

from __future__ import annotations

import functools
import os
import signal
import subprocess

import child_process
import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


@pytest.fixture
def light(tmp_path, monkeypatch):
    """A server of its own, which does not import PyTorch; returns what gives it."""
    file = tmp_path / "fork_server.py"
    text = child_process.SERVER.read_text()
    assert "import torch" in text
    file.write_text("\n".join(line for line in text.splitlines() if not line.startswith("import torch")))
    monkeypatch.setattr(child_process, "SERVER", file)
    servers = functools.cache(child_process._server.__wrapped__)
    monkeypatch.setattr(child_process, "_server", servers)
    yield lambda: servers(os.getpid())
    child_process._end(servers(os.getpid()))


def test_a_timeout_has_what_was_printed_and_the_next_process_runs(light, monkeypatch):
    monkeypatch.setattr(child_process, "SECONDS", 3)
    code = "import sys, time; print('seen', flush=True); print('why', file=sys.stderr); time.sleep(60)"
    with pytest.raises(subprocess.TimeoutExpired) as error:
        child_process.python(code)
    assert (error.value.timeout, error.value.output, error.value.stderr) == (3, "seen\n", "why\n")
    monkeypatch.undo()
    assert child_process.python("print(1)").stdout == "1\n"


@pytest.mark.parametrize("when", ["before", "while"])
def test_a_server_that_is_gone_is_told_once(light, when):
    server = light()
    assert child_process.python("print(1)").stdout == "1\n"
    if when == "before":
        server.kill()
        server.wait()
    with pytest.raises(RuntimeError, match=r"^fork_server.py ended with status -9$"):
        child_process.python("import os, signal; os.kill(os.getppid(), signal.SIGKILL)")
    assert child_process.python("print(2)").stdout == "2\n" and light() is not server


def test_a_number_that_may_be_anothers_gets_no_signal(light, monkeypatch):
    server, sent = light(), []
    server.kill()
    server.wait()
    monkeypatch.setattr(os, "killpg", lambda *given: sent.append(given))
    child_process._end(server)
    assert sent == [] and server.returncode == -signal.SIGKILL
