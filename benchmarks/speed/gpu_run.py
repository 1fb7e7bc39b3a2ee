"""How benchmarks/gpu.py runs its parts: within limits, side by side where they check and alone where they
measure, and so that what was found lies in four files whatever stops it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speed.gpu_files import packed
from speed.gpu_plan import ROOT, Part
from speed.gpu_running import Running
from speed.gpu_watch import Watch

GRACE = 8  # seconds after SIGINT in which pytest says what failed, before SIGKILL
CLOSING = 4  # seconds kept for the last packing
STOPPING = 2  # seconds that a part has where the command itself is stopped
# processes at a time, as parts say how many they have: a few more than processors, since some wait
ROOM = max((os.cpu_count() or 1) * 5 // 4, 1)
PACK_EVERY = 5  # seconds after which what a part has printed so far is packed
BEFORE_MEASURING = "stopped before measuring"


class Run:
    """The command's own state: what is left of its time, what was found, and the four files. What parts write
    lies in a folder that goes where a ``with`` of it ends.

    Raises:
        OSError: ``out`` cannot be written to.
    """

    def __init__(self, out: Path, minutes: float, rehearse: bool):
        self.begun, self.seconds, self.rehearse = time.monotonic(), 60 * minutes, rehearse
        self.summary: dict[str, Any] = {"minutes": minutes, "rehearsal": rehearse, "parts": []}
        self.running: list[Running] = []
        self.watch: Watch | None = None  # while parts run
        self.stopped = False  # by a signal
        self.noting = False  # a signal is noted, and ends nothing
        self.trouble = ""  # why it could not be packed
        out.mkdir(parents=True, exist_ok=True)
        for name in ("gpu.log", "gpu-outputs.txt"):
            (out / name).write_text("", encoding="utf-8")
        self.out, self.staging = out, Path(tempfile.mkdtemp(prefix="fastkd-gpu-"))

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self.staging, ignore_errors=True)

    def passed(self) -> float:
        return time.monotonic() - self.begun

    def left(self) -> float:
        return self.seconds - CLOSING - self.passed()

    def say(self, line: str) -> None:
        line = f"{self.passed():4.0f} s  {line}"
        with contextlib.suppress(OSError):
            print(line, flush=True)
        with contextlib.suppress(OSError), (self.out / "gpu.log").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def signalled(self, number: int, frame: Any) -> None:
        """The handler of the signals that end the command. The first one ends it; another would keep it from
        ending its parts, which have sessions of their own. It stays installed: parts would inherit that a
        signal is ignored.
        """
        if self.stopped:
            return
        self.stopped = True
        if not self.noting:
            raise KeyboardInterrupt

    def begin(self, part: Part, seconds: float) -> None:
        """Start a part that may take so many seconds. One that cannot be started is reported.

        Raises:
            KeyboardInterrupt: a signal came meanwhile; the part is among those that run.
        """
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
        self.noting = True  # until what was started is known
        try:
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
            if self.watch:
                self.watch.tell(process.pid)
        except OSError as error:
            self.tell(part, "not started", 0, "", f"{error.strerror}: {error.filename}")
        finally:
            self.noting = False
        if self.stopped:
            raise KeyboardInterrupt

    def at_hand(self) -> list[Running]:
        """What runs and is waited for."""
        return [one for one in self.running if one.waited_for]

    def fits(self, part: Part) -> bool:
        return sum(one.part.processes for one in self.running) + part.processes <= ROOM

    def ready(self, part: Part | None) -> bool:
        """Whether it may begin: alone if it measures, else where there is room. None: all have ended."""
        at_hand = self.at_hand()
        if not at_hand or part is None or part.measures or any(one.part.measures for one in at_hand):
            return not at_hand
        return self.fits(part)

    def wait(self, part: Part | None, behind: list[Part]) -> None:
        """Until this part may begin. One that reaches its limit gets SIGINT, and later SIGKILL.

        ``behind``: parts that begin meanwhile, where there is room, and are taken from the list; if none of
        them runs, one does in any case.
        """
        last, names = self.passed(), {one.name for one in behind}
        while True:
            for one in list(self.running):
                self._look(one)
            if self.ready(part):
                return
            while behind and (
                self.fits(behind[0]) or not any(one.part.name in names for one in self.running)
            ):
                self.begin(behind.pop(0), float("inf"))
            if self.passed() - last >= PACK_EVERY:  # nobody announces SIGKILL to the command itself
                self.pack()
                last = self.passed()
            time.sleep(0.02)

    def _look(self, one: Running) -> None:
        if one.process.poll() is None:
            if one.interrupted is None:
                if self.passed() - one.begun >= one.seconds:
                    one.interrupt("stopped at its limit")
                    one.interrupted = self.passed() + min(GRACE, max(self.left(), 1))
                return
            if self.passed() < one.interrupted:
                return
        one.kill()
        one.wait(5)
        self.found(one)

    def stop(self, these: list[Running], grace: float, why: str) -> None:
        """Stop parts, which have ``grace`` seconds to say what they found. All are killed before anything is
        written: that may fail.
        """
        try:
            for one in these:
                one.interrupt(why)
            end = self.passed() + grace
            for one in these:
                one.wait(max(end - self.passed(), 0.01))
        finally:
            for one in these:
                one.kill()
        for one in these:
            one.wait(5)
            self.found(one)

    def end(self) -> None:
        """Stops and reports what runs, and packs. A signal that comes now is noted only."""
        try:
            self.noting = True
            at_hand = self.at_hand()
            self.stop(at_hand, STOPPING, "stopped")
            self.stop(list(self.running), 1, BEFORE_MEASURING)
            self.pack()
        finally:  # the one signal that raises may have come in the lines above
            for one in self.running:
                one.kill()

    def found(self, one: Running) -> None:
        """Adds an ended part's output and a line about it, and packs what there is."""
        self.running.remove(one)
        if self.watch:
            self.watch.tell(one.process.pid)
        try:
            text = one.output.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            text = f"its output cannot be read: {error.strerror}"
        limit = f" of {one.seconds:.0f}" if one.waited_for else ""
        self.tell(one.part, one.stopped or one.process.returncode, self.passed() - one.begun, limit, text)

    def tell(self, part: Part, status: int | str | None, seconds: float, limit: str, text: str) -> None:
        lines = [line for line in text.splitlines() if line.strip()]
        told = lines[-1][:160] if lines else "nothing printed"
        self.summary["parts"].append(
            {"name": part.name, "status": status, "seconds": round(seconds, 1), "last": told}
        )
        self.say(
            f"{part.name}: {'ok' if status == 0 else f'status {status}'}, {seconds:.0f}{limit} s: {told}"
        )
        try:
            with (self.out / "gpu-outputs.txt").open("a", encoding="utf-8") as file:
                file.write(f"\n===== {part.name}: status {status}, {seconds:.0f} s =====\n{text}")
        except OSError as error:
            self.say(f"{part.name}: gpu-outputs.txt lacks what it printed: {error.strerror}")
        self.pack()

    def pack(self) -> None:
        """The summary and the archive, each written whole and renamed; a line of the log if that fails."""
        try:
            packed(self.out, self.staging, self.summary)
        except OSError as error:
            if self.trouble != str(error):
                self.trouble = str(error)
                self.say(f"not packed: {error}")


def execute(
    run: Run, parts: Sequence[Part], background: Sequence[Part] = (), compiling: Sequence[Part] = ()
) -> None:
    """Parts that check run side by side, as many as the processors have room for; parts that measure run
    alone.

    What is in the ``background`` begins after the first part. What is ``compiling`` begins, in its order,
    once all that check before the first measuring have begun, as far as they leave room. Both go on until
    something is measured.
    """
    run.watch = Watch()
    try:
        for i, part in enumerate(parts):
            behind = list(compiling) if part.measures else []
            run.wait(part, behind)
            if part.measures:
                compiling = ()
                run.stop(list(run.running), GRACE, BEFORE_MEASURING)
            seconds = min(part.seconds, run.left())
            if seconds < 3:
                run.say(f"{part.name}: left out, no time")
                continue
            run.begin(part, seconds)
            if i == 0:
                for one in background:
                    run.begin(one, float("inf"))
        run.wait(None, [])
    finally:  # what it found until now is part of the results
        run.end()
        run.watch.close()
