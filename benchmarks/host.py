"""What the host pays for a loss on a GPU, as far as a machine without one can tell: python benchmarks/host.py
[--against DIR]

With ``--against DIR``, another clone, instead: what the host pays for a tiny loss on a CPU in both
(speed/against.py).

Three stages of tiny tensors, one thread, microseconds of processor time a call: the least of several
interleaved rounds.

- ``eager``: the formula users write, on a CPU: its operators' own work, of a few hundred numbers each, is in
  it;
- ``triton``: the launchers, against a stand-in for Triton's driver that swallows launches
  (tests/helpers/triton_compile.py);
- ``cuda``: the operators of the CUDA library, compiled for the CPU and with the kernels left out
  (tests/helpers/emulated.py).

Not in any of them: what the driver takes to launch a kernel, a few microseconds each. Eager launches dozens;
`cuda` one each way, `triton` one more forward. Autograd is in the first alone: it costs the other two the
same.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE.parent / "tests" / "helpers")]

import emulated  # noqa: E402
import torch  # noqa: E402
from speed.against import compare  # noqa: E402
from speed.formulas import FORMULAS  # noqa: E402

from fastkd import kernels  # noqa: E402
from fastkd._bits import ATTENTION, FSP  # noqa: E402

SIZES = ((16, 8), (32, 4), (32, 4))  # channels, height and width of a stage
ROUNDS, CALLS = 15, 300
TRANSFER = ATTENTION.pack(channel_reduce="mean", pool="before", student_grad=True)
CHAIN = FSP.pack(precision="tf32", with_grad=True)
Call = Callable[[], Any]


def eager(operation: str) -> tuple[Call, Call]:
    """Forward, and forward with backward."""
    students, teachers = ([torch.rand(2, c, n, n) for c, n in SIZES] for _ in range(2))
    students = [x.requires_grad_() for x in students]
    formula = FORMULAS[operation]
    return lambda: formula(students, teachers), lambda: torch.autograd.grad(
        formula(students, teachers), students
    )


def fused(operation: str, find: Callable[[str], Callable[..., Any]]) -> tuple[Call, Call]:
    students, teachers = ([torch.zeros(2, c, n, n) for c, n in SIZES] for _ in range(2))
    grad = torch.ones(())
    if operation == "attention":
        forward, backward = find("attention_transfer_loss"), find("attention_transfer_loss_backward")

        def run() -> Any:
            return forward(students, teachers, TRANSFER, [0.0, 2.0, 1e-12, 1.0])

        return run, lambda: backward(grad, students, run()[1], 2.0, TRANSFER)
    forward, backward = find("fsp_loss"), find("fsp_loss_backward")

    def run_chain() -> Any:
        return forward(students, teachers, CHAIN, [0.0, 1.0])

    return run_chain, lambda: backward(grad, students, run_chain()[1], CHAIN, [0, 1, 2], [])


def rows(operation: str) -> dict[str, tuple[Call, Call]]:
    made = {"eager": eager(operation)}
    if kernels.state()[0] or "is installed" in kernels.state()[1]:
        import triton
        import triton_compile

        class Swallow(triton_compile.Driver):
            def launcher_cls(self, src: Any, metadata: Any) -> Any:
                return lambda *args: None

        triton.runtime.driver.set_active(Swallow(90))
        made["triton"] = fused(operation, kernels.launcher)
    emulated.load()
    made["cuda"] = fused(operation, lambda name: getattr(torch.ops.fastkd_cuda, name).default)
    return made


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--against", type=Path, metavar="DIR", help="another clone of fastkd with its libraries built"
    )
    given = parser.parse_args()
    if given.against:
        compare(given.against, HERE.parent)
        return
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}; µs a call, three stages: forward, forward and backward")
    for operation, name in (("attention", "AT"), ("fsp", "FSP")):
        calls = [
            (row, direction, call)
            for row, pair in rows(operation).items()
            for direction, call in zip(("forward", "both"), pair)
        ]
        least: dict[tuple[str, str], float] = {}
        with emulated.idle():
            for number in range(ROUNDS + 1):
                for row, direction, call in calls:
                    fused_row = row != "eager"
                    with torch.set_grad_enabled(not fused_row):
                        begun = time.process_time()
                        for _ in range(CALLS):
                            call()
                        spent = (time.process_time() - begun) / CALLS * 1e6
                    if number:  # the first one compiles and plans
                        least[row, direction] = min(spent, least.get((row, direction), spent))
        for row in dict.fromkeys(row for row, _, _ in calls):
            print(f"{name:4} {row:7} {least[row, 'forward']:7.1f} {least[row, 'both']:7.1f}")


if __name__ == "__main__":
    main()
