"""``python -m fastkd``: what is installed, what works here, and why the rest does not. ``--json`` says the
same for programs.
"""

from __future__ import annotations

import json
import platform
import textwrap
from typing import Any

import torch

import fastkd
from fastkd import backends, kernels, native
from fastkd.io.arguments import OneLineParser
from fastkd.io.console import screens


def report() -> dict[str, Any]:
    """The report as plain data: fastkd, python, torch, triton, cuda, native, backends."""
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if torch.cuda.is_available()
        else []
    )
    return {
        "fastkd": fastkd.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": kernels.triton_version(),
        "cuda": {"torch": torch.version.cuda, "devices": gpus},
        "native": native.report(),
        "backends": {
            name: {"available": ok, "reason": why} for name, (ok, why) in backends.availability().items()
        },
    }


def _lines(facts: dict[str, Any]) -> list[str]:
    cuda = facts["cuda"]
    lines = [
        (
            f"fastkd {facts['fastkd']}, Python {facts['python']}, torch {facts['torch']}, triton"
            f" {facts['triton'] or 'not installed'}"
        ),
        f"CUDA in torch: {cuda['torch'] or 'none'}; devices: {', '.join(cuda['devices']) or 'none'}",
    ]
    lines += ["", "compiled libraries"]
    for name, library in facts["native"].items():
        lines += _entry(name, library)
        details = {
            key.replace("_", " "): value
            for key, value in library.items()
            if key not in ("available", "reason", "path")
        }
        lines += [
            f"  {'':<15} {key}: {', '.join(value) if isinstance(value, list) else value}"
            for key, value in details.items()
        ]
    lines += ["", "backends"]
    for name, entry in facts["backends"].items():
        lines += _entry(name, entry)
    return lines


def _entry(name: str, entry: dict[str, Any]) -> list[str]:
    """Whether something is there and why, in lines of at most 100 columns where its words allow that."""
    text = f"  {name:<10} {'yes' if entry['available'] else 'no ':<4} {entry['reason']}"
    return textwrap.wrap(
        text, 100, subsequent_indent=" " * 18, break_long_words=False, break_on_hyphens=False
    )


@screens()
def main() -> None:
    text = "What is installed, what works here, and why the rest does not."
    parser = OneLineParser(prog="python -m fastkd", description=text, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="the same as JSON, for programs")
    arguments = parser.parse_args()  # before the report, which takes seconds
    facts = report()
    print(json.dumps(facts, indent=2) if arguments.json else "\n".join(_lines(facts)))


if __name__ == "__main__":
    main()
