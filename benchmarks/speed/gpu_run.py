"""How benchmarks/gpu.py runs its parts: within limits, side by side where they check and alone where they
measure, and so that what was found lies in four files whatever stops it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speed.gpu_plan import ROOT, Part
from speed.gpu_summary import speedups

GRACE = 8  # seconds after SIGINT in which pytest says what failed, before SIGKILL
CLOSING = 4  # seconds kept for the last packing
STOPPING = 2  # seconds that a part has where the command itself is stopped
LANES = max((os.cpu_count() or 1) // 4, 1)  # parts that check at a time
PACK_EVERY = 5  # seconds after which what a part has printed so far is packed


@dataclass
class Running:
    """A part that was started, ``begun`` seconds after the command; ``interrupted``: when it is killed."""

    part: Part
    process: subprocess.Popen[bytes]
    output: Path
    begun: float
    seconds: float
    interrupted: float | None = None

    def interrupt(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGINT)

    def kill(self) -> None:
        """With all that it started, which may have outlived it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)


class Run:
    """The command's own state: what is left of its time, what was found, and the four files."""

    def __init__(self, out: Path, minutes: float, rehearse: bool):
        self.begun, self.seconds, self.rehearse = time.monotonic(), 60 * minutes, rehearse
        self.out, self.staging = out, Path(tempfile.mkdtemp(prefix="fastkd-gpu-"))
        self.summary: dict[str, Any] = {"minutes": minutes, "rehearsal": rehearse, "parts": []}
        self.running: list[Running] = []
        self.stopped = False
        out.mkdir(parents=True, exist_ok=True)
        for name in ("gpu.log", "gpu-outputs.txt"):
            (out / name).write_text("", encoding="utf-8")

    def passed(self) -> float:
        return time.monotonic() - self.begun

    def left(self) -> float:
        return self.seconds - CLOSING - self.passed()

    def say(self, line: str) -> None:
        line = f"{self.passed():4.0f} s  {line}"
        with contextlib.suppress(OSError):
            print(line, flush=True)
        with (self.out / "gpu.log").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def begin(self, part: Part, seconds: float) -> Running:
        """Start a part that may take so many seconds."""
        output = self.staging / f"{re.sub('[^a-z0-9]+', '-', part.name.lower())}.txt"
        variables = {
            **os.environ,
            **dict(part.variables),
            "FASTKD_GPU_OUT": str(self.staging),
            "PYTHONUNBUFFERED": "1",
        }
        # after ours: packages that were carried along without an installation
        folders = (ROOT, ROOT / "benchmarks", ROOT / "tests" / "helpers", os.environ.get("PYTHONPATH"))
        variables["PYTHONPATH"] = os.pathsep.join(str(folder) for folder in folders if folder)
        if self.rehearse:
            variables["FASTKD_GPU_REHEARSAL"] = variables["TRITON_INTERPRET"] = "1"
        # what a part writes lies in the staging folder, though it runs in the clone
        command = [
            word.replace("speed/", f"{self.staging}/speed/", 1) if word.startswith("speed/") else word
            for word in part.command
        ]
        with output.open("wb") as file:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=variables,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.running.append(Running(part, process, output, self.passed(), seconds))
        return self.running[-1]

    def at_hand(self) -> list[Running]:
        """What runs and is waited for."""
        return [one for one in self.running if one.seconds < float("inf")]

    def wait(self, fewer_than: int) -> None:
        """Until fewer parts run than that. One that reaches its limit gets SIGINT, and later SIGKILL."""
        packed = self.passed()
        while True:
            for one in list(self.running):
                self._look(one)
            if len(self.at_hand()) < fewer_than:
                return
            if self.passed() - packed >= PACK_EVERY:  # nobody announces SIGKILL to the command itself
                self.pack()
                packed = self.passed()
            time.sleep(0.02)

    def _look(self, one: Running) -> None:
        status: int | str | None = one.process.poll()
        if status is None:
            if one.interrupted is None:
                if self.passed() - one.begun >= one.seconds:
                    one.interrupt()
                    one.interrupted = self.passed() + min(GRACE, max(self.left(), 1))
                return
            if self.passed() < one.interrupted:
                return
        one.kill()
        self.found(one, "stopped at its limit" if one.interrupted is not None else status)

    def stop(self, these: list[Running], grace: float, status: str) -> None:
        """Stop parts, which have ``grace`` seconds to say what they found."""
        ended = {one.output: one.process.poll() for one in these}
        for one in these:
            one.interrupt()
        end = self.passed() + grace
        for one in these:
            with contextlib.suppress(subprocess.TimeoutExpired):
                one.process.wait(max(end - self.passed(), 0.01))
            one.kill()
            before = ended[one.output]
            self.found(one, status if before is None else before)

    def found(self, one: Running, status: int | str | None) -> None:
        """Adds an ended part's output and a line about it, and packs what there is."""
        self.running.remove(one)
        part, seconds = one.part, self.passed() - one.begun
        text = one.output.read_text(encoding="utf-8", errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        told = lines[-1][:160] if lines else "nothing printed"
        self.summary["parts"].append(
            {"name": part.name, "status": status, "seconds": round(seconds, 1), "last": told}
        )
        with (self.out / "gpu-outputs.txt").open("a", encoding="utf-8") as file:
            file.write(f"\n===== {part.name}: status {status}, {seconds:.0f} s =====\n{text}")
        limit = f" of {one.seconds:.0f}" if one.seconds < float("inf") else ""
        self.say(
            f"{part.name}: {'ok' if status == 0 else f'status {status}'}, {seconds:.0f}{limit} s: {told}"
        )
        self.pack()

    def pack(self) -> None:
        """The summary and the archive, each written whole and renamed."""
        for file in sorted(self.staging.glob("*.json")):
            with contextlib.suppress(ValueError):
                self.summary[file.stem] = json.loads(file.read_text(encoding="utf-8"))
        self.summary["speed"] = dict(speedups(self.staging))
        write(self.out / "gpu-summary.json", (json.dumps(self.summary, indent=1) + "\n").encode())
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            archive.add(
                self.staging,
                "gpu-results",
                filter=lambda info: None if info.name.endswith((".pt", ".tmp")) else info,
            )
        write(self.out / "gpu-results.tar.gz", packed.getvalue())


def write(target: Path, content: bytes) -> None:
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(target)


def execute(run: Run, parts: list[Part], background: Sequence[Part] = ()) -> None:
    """Parts that check run side by side, as many as the processor has room for, and what is in the background
    beside them; parts that measure run alone.
    """
    behind: list[Running] = []
    try:
        for i, part in enumerate(parts):
            run.wait(1 if part.measures else LANES)
            if part.measures:
                run.stop([one for one in behind if one in run.running], GRACE, "stopped before measuring")
            seconds = min(part.seconds, run.left())
            if seconds < 3:
                run.say(f"{part.name}: left out, no time")
                continue
            run.begin(part, seconds)
            if i == 0:
                behind = [run.begin(one, float("inf")) for one in background]
        run.wait(1)
    finally:  # what it found until now is part of the results
        run.stop(run.at_hand(), STOPPING, "stopped")
        run.stop(list(run.running), 1, "stopped before measuring")
        run.pack()
