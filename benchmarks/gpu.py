"""The most that can be proven and measured with a GPU in a few minutes, by one command without a network.

    python benchmarks/gpu.py --minutes 8 --data DIR     results into benchmarks/results/<device>/
    python benchmarks/gpu.py --rehearse                 the same plan without a GPU; nothing is measured

Nothing needs to be installed but PyTorch, Triton and pytest (pytest-xdist runs tests side by side): in a
clone with both compiled libraries in fastkd/, PYTHONPATH is set for every part. docs/gpu.md says what to
carry and how to read what comes back.

Parts run one after the other, the most telling first, each in a process group of its own and within a limit
of its own; a training run goes on in the background until measuring begins. Whatever stops the command, what
was found until then lies in four files: gpu.log (this command's lines), gpu-outputs.txt (what the parts
printed), gpu-summary.json and gpu-results.tar.gz (what they wrote).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from speed.gpu_plan import Part, left_out, plan, training
from speed.gpu_summary import speedups

ROOT = Path(__file__).resolve().parent.parent
GRACE = 8  # seconds after SIGINT in which pytest says what failed, before SIGKILL
CLOSING = 4  # seconds kept for the last packing
STOPPING = 2  # seconds that a part has where the command itself is stopped
PACK_EVERY = 5  # seconds after which what a part has printed so far is packed


class Run:
    """The command's own state: what is left of its time, what was found, and the four files."""

    def __init__(self, out: Path, minutes: float, rehearse: bool):
        self.begun, self.seconds, self.rehearse = time.monotonic(), 60 * minutes, rehearse
        self.out, self.staging = out, Path(tempfile.mkdtemp(prefix="fastkd-gpu-"))
        self.summary: dict[str, Any] = {"minutes": minutes, "rehearsal": rehearse, "parts": []}
        self.current: subprocess.Popen[bytes] | None = None
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

    def start(self, part: Part) -> tuple[subprocess.Popen[bytes], Path]:
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
        return process, output

    def run(self, part: Part) -> None:
        limit = min(part.seconds, self.left())
        if limit < 3:
            self.say(f"{part.name}: left out, no time")
            return
        begun = self.passed()
        self.current, output = self.start(part)
        status: int | str = "stopped"
        try:
            try:
                status = self.wait(self.current, limit)
            except subprocess.TimeoutExpired:
                end(self.current, min(GRACE, max(self.left(), 1)))
                status = "stopped at its limit"
        except KeyboardInterrupt:  # what it found until now is part of the results
            end(self.current, STOPPING)
            raise
        finally:
            self.current = None
            self.found(part, status, self.passed() - begun, limit, output)

    def wait(self, process: subprocess.Popen[bytes], limit: float) -> int:
        """Its exit status, or TimeoutExpired. Packs now and then: nobody announces SIGKILL."""
        end = self.passed() + limit
        while True:
            left = end - self.passed()
            try:
                return process.wait(min(max(left, 0), PACK_EVERY))
            except subprocess.TimeoutExpired:
                if left <= PACK_EVERY:
                    raise
                self.pack()

    def found(self, part: Part, status: int | str, seconds: float, limit: float, output: Path) -> None:
        """Adds a part's output and a line about it, and packs what there is."""
        text = output.read_text(encoding="utf-8", errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        told = lines[-1][:160] if lines else "nothing printed"
        self.summary["parts"].append(
            {"name": part.name, "status": status, "seconds": round(seconds, 1), "last": told}
        )
        with (self.out / "gpu-outputs.txt").open("a", encoding="utf-8") as file:
            file.write(f"\n===== {part.name}: status {status}, {seconds:.0f} s =====\n{text}")
        self.say(
            f"{part.name}: {'ok' if status == 0 else f'status {status}'}, {seconds:.0f} of {limit:.0f} s:"
            f" {told}"
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


def end(process: subprocess.Popen[bytes], grace: float) -> None:
    """SIGINT to a part and all that it started, and SIGKILL to what is there after ``grace`` seconds."""
    for number, patience in ((signal.SIGINT, grace), (signal.SIGKILL, 5)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # children that outlived the leader of the group


def execute(run: Run, parts: list[Part], background: Part | None) -> None:
    behind: tuple[Part, float, subprocess.Popen[bytes], Path] | None = None

    def finish(grace: float) -> None:
        nonlocal behind
        if behind is not None:
            part, begun, process, output = behind
            behind = None
            status: int | str | None = process.poll()
            if status is None:
                end(process, grace)
                status = "stopped before measuring"
            run.found(part, status, run.passed() - begun, run.passed() - begun, output)

    try:
        for part in parts:
            if run.stopped:
                break
            if part.measures:
                finish(GRACE)
            run.run(part)
            if background is not None:
                behind, background = (background, run.passed(), *run.start(background)), None
    finally:
        finish(1)
        if run.current is not None:
            end(run.current, 1)
        run.pack()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    path: Callable[[str], Path] = lambda text: Path(os.path.expanduser(text)).resolve()  # noqa: E731
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all of it (8)")
    parser.add_argument(
        "--data", type=path, metavar="DIR", help="CIFAR-10 or Fashion-MNIST for the training run"
    )
    parser.add_argument(
        "--out", type=path, metavar="DIR", help="where the four files go (benchmarks/results/<device>)"
    )
    parser.add_argument("--only", metavar="WORD", help="parts whose names contain it")
    parser.add_argument(
        "--rehearse", action="store_true", help="without a GPU: Triton interpreted, the CUDA kernels emulated"
    )
    flags = parser.parse_args()
    if not 0 < flags.minutes < float("inf"):
        parser.error(f"--minutes is {flags.minutes:g}, wanted a number above 0")
    device = "rehearsal"
    if not flags.rehearse:
        import torch

        if not torch.cuda.is_available():
            parser.error("PyTorch sees no CUDA device; --rehearse goes as far as that allows")
        device = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    parts = [part for part in plan(flags.rehearse) if not flags.only or flags.only in part.name]
    if not parts:
        parser.error(
            f"--only is {flags.only!r}, wanted a word of one of:"
            f" {', '.join(part.name for part in plan(flags.rehearse))}"
        )
    if flags.rehearse:  # not counted: a machine with a GPU compiles nothing for a CPU
        sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]
        import emulated

        emulated.build()
    out = flags.out or ROOT / "benchmarks" / "results" / device
    try:
        run = Run(out, flags.minutes, flags.rehearse)
    except OSError as error:
        parser.error(f"--out is {str(out)!r}, wanted a folder to write into: {error.strerror}")

    def stop(number: int, frame: Any) -> None:
        run.stopped = True
        raise KeyboardInterrupt

    # an ignored SIGINT, as of a shell's &, would be inherited by the parts, which it ends at their limit; an
    # ignored SIGHUP stays so: nohup is to outlive the terminal
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)
    for line in left_out(flags.data, flags.rehearse):
        run.say(line)
    try:
        execute(run, parts, None if flags.only else training(flags.data, flags.rehearse))
    except KeyboardInterrupt:
        run.say("stopped; what was found is kept")
    run.say(f"results: {run.out}")
    shutil.rmtree(run.staging, ignore_errors=True)
    return int(run.stopped or any(part["status"] != 0 for part in run.summary["parts"]))


if __name__ == "__main__":
    sys.exit(main())
