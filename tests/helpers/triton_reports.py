"""Runs triton_compile.py once for all tests of a process, beside them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

CAPABILITIES = (80, 90, 100)


def reports(stop: threading.Event) -> dict[int, dict]:
    env = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    script = Path(__file__).parent / "triton_compile.py"
    command = [sys.executable, str(script), ",".join(map(str, CAPABILITIES))]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, env=env, stdout=out, stderr=errors, start_new_session=True) as process:
            while process.poll() is None:
                if stop.wait(0.1):
                    os.killpg(process.pid, signal.SIGKILL)
                    break
        for file in (out, errors):
            file.seek(0)
        assert process.returncode == 0, errors.read()
        found = [{case["case"]: case for case in json.loads(line)} for line in out]
        return dict(zip(CAPABILITIES, found, strict=True))


REPORTS: list[Future[dict[int, dict]]] = []


def beforehand() -> Callable[[], None]:
    """Compile, on an idle core, while tests before these run: without Triton's cache it takes two minutes."""
    stop, pool = threading.Event(), ThreadPoolExecutor(1)
    REPORTS.append(pool.submit(reports, stop))

    def end() -> None:
        stop.set()
        pool.shutdown(cancel_futures=True)

    return end
