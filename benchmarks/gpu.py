"""The most that can be proven and measured with a GPU in a few minutes, by one command without a network.

    python benchmarks/gpu.py --minutes 8 --data DIR     results into benchmarks/results/<device>/
    python benchmarks/gpu.py --rehearse                 the same plan without a GPU; nothing is measured

Nothing needs to be installed but PyTorch, Triton and pytest (pytest-xdist runs tests side by side): in a
clone with both compiled libraries in fastkd/, PYTHONPATH is set for every part. docs/gpu.md says what to
carry and how to read what comes back.

Each part runs in a process group of its own and within a limit of its own, the most telling first: those that
check side by side, those that measure alone. A training run, and processes that compile what will be
measured, go on in the background until measuring begins: that they are stopped then is no failure. Whatever
stops the command, what was found until then lies in four files: gpu.log (this command's lines),
gpu-outputs.txt (what the parts printed), gpu-summary.json and gpu-results.tar.gz (what they wrote).
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from speed.gpu_plan import ROOT, compiling, left_out, plan, training
from speed.gpu_run import BEFORE_MEASURING, Run, execute


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
    with run:
        # an ignored SIGINT, as of a shell's &, would be inherited by the parts, which it ends at their limit;
        # an ignored SIGHUP stays so: nohup is to outlive the terminal
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, run.signalled)
        try:
            for line in left_out(flags.data, flags.rehearse):
                run.say(line)
            if flags.only:
                execute(run, parts)
            else:
                execute(run, parts, training(flags.data, flags.rehearse), compiling(flags.rehearse))
        except KeyboardInterrupt:
            run.say("stopped; what was found is kept")
        run.say(f"results: {run.out}")
    return int(run.stopped or any(one["status"] not in (0, BEFORE_MEASURING) for one in run.summary["parts"]))


if __name__ == "__main__":
    sys.exit(main())
