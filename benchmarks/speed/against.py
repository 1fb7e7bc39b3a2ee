"""Two trees of fastkd side by side: the host's time of a tiny loss in each, call by call in turn.

``python benchmarks/host.py --against DIR``: DIR is another clone with its libraries built. Each tree runs in
a process of its own, one thread; the two take turns case by case, so that other work on the machine slows
both alike. Microseconds of processor time, the least of the stretches, through the public functions on CPU
tensors.
"""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# A turn is cut in stretches of half a millisecond, of which many are not interrupted on a busy machine; its
# first calls fill the caches again. A process keeps the places of its memory, by which a call may take a
# tenth longer: several run one after the other.
PROCESSES, ROUNDS, STRETCHES, CALLS, UNTIMED = 5, 40, 10, 10, 10
# three stages (channels, height and width) of two samples: small enough that the kernels' own arithmetic
# hardly counts
TINY = ((4, 4), (8, 2), (8, 2))
WAYS = ("no gradient", "forward", "both")
CASES = [(loss, way) for loss in ("attention_transfer_loss", "fsp_loss") for way in WAYS]


def work() -> None:
    """In a tree's own process: run the case whose number is read, and answer with its microseconds a call."""
    import torch

    import fastkd

    torch.set_num_threads(1)
    students, teachers = ([torch.rand(2, c, n, n) for c, n in TINY] for _ in range(2))
    learners = [x.clone().requires_grad_() for x in students]

    def call(loss: str, way: str) -> Callable[[], Any]:
        function = getattr(fastkd, loss)
        if way == "both":
            return lambda: torch.autograd.grad(function(learners, teachers), learners)
        return lambda: function(students if way == "no gradient" else learners, teachers)

    calls = [call(*case) for case in CASES]
    print(fastkd.__file__, flush=True)
    for line in sys.stdin:
        run = calls[int(line)]
        for _ in range(UNTIMED):
            run()
        least = math.inf
        for _ in range(STRETCHES):
            begun = time.process_time()
            for _ in range(CALLS):
                run()
            least = min(least, (time.process_time() - begun) / CALLS * 1e6)
        print(least, flush=True)


class Tree:
    """A process that imports fastkd from one folder."""

    def __init__(self, top: Path) -> None:
        code = (
            f"import sys; sys.path[:0] = [{str(top)!r}, {str(Path(__file__).parent)!r}]; import against;"
            " against.work()"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdin and process.stdout
        self.process, self.to, self.back = process, process.stdin, process.stdout
        loaded = Path(self.back.readline().strip())
        if loaded.resolve().parent.parent != top.resolve():
            self.end()
            raise SystemExit(f"host.py: fastkd was imported from {loaded.parent}, wanted the tree {top}")

    def microseconds(self, case: int) -> float:
        print(case, file=self.to, flush=True)
        return float(self.back.readline())

    def end(self) -> None:
        self.to.close()
        self.back.close()
        self.process.wait()


def compare(old: Path, new: Path, rounds: int = ROUNDS, processes: int = PROCESSES) -> float:
    """Print a table of both trees; return the geometric mean of new / old over a training step's calls."""
    least = [[math.inf] * len(CASES) for _ in range(2)]
    for _ in range(processes):
        trees = [Tree(old), Tree(new)]
        for _ in range(rounds):
            for case in range(len(CASES)):
                for tree, best in zip(trees, least):
                    best[case] = min(best[case], tree.microseconds(case))
        for tree in trees:
            tree.end()
    print(f"{'µs a call':36} {'old':>7} {'new':>7} {'new/old':>8}")
    ratios = [b / a for a, b in zip(*least)]
    for (loss, way), a, b, ratio in zip(CASES, *least, ratios):
        print(f"{loss:24} {way:11} {a:7.1f} {b:7.1f} {ratio:8.2f}")
    training = [ratio for (_, way), ratio in zip(CASES, ratios) if way != "no gradient"]
    mean = math.exp(sum(map(math.log, training)) / len(training))
    print(f"{'geometric mean of forward and both':52} {mean:8.3f}")
    return mean
