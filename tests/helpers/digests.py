#!/usr/bin/env python
"""Digests of short trainings, one for each recipe, and their machines: tests/helpers/digests.json.

    python tests/helpers/digests.py

writes the entry of this machine. A training is the command itself on 40 random images: a teacher, then a
student by AT, FSP and KD, two epochs each, with the recipe's first phase where it has one; in float32, by one
thread.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import platform
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from child_process import python

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_suffix(".json")
FLAGS = (
    "--method at+fsp+kd --dataset cifar100 --teacher resnet8 --student resnet8 --batch-size 16 --epochs 2"
    " --seed 0 --device cpu --precision fp32 --no-compile --no-pictures"
).split()
CLOCKED = ("seconds", "images_per_second")
# variables with which PyTorch, MKL, oneDNN or fastkd compute otherwise
VARIABLES = re.compile(
    r"(ATEN_CPU_CAPABILITY|FASTKD_(AMX|BACKEND|CPU)|(MKL|DNNL|ONEDNN)_(?!NUM_THREADS)\w+)$"
)
FEATURES = re.compile(r"(sse|ssse|avx|amx|fma|f16c)")


def machine() -> dict[str, str]:
    """All that results may depend on beside the code: versions, the processor, its caches (blocks of matrix
    products have their sizes), variables. Another compiler may join a product and a sum where ours does not.
    """
    from fastkd import native
    from fastkd.training.device import processor_features

    built = torch.__config__.show()
    mkl, onednn = (re.search(rf"{name} v?([\d.]+)", built) for name in ("Kernel Library Version", "MKL-DNN"))
    library = native.report()["cpu"] if native.CPU.available else {}
    variables = sorted(f"{name}={os.environ[name]}" for name in os.environ if VARIABLES.match(name))
    return {
        "torch": torch.__version__,
        "mkl": mkl[1] if mkl else "none",
        "onednn": onednn[1] if onednn else "none",
        "libc": " ".join(platform.libc_ver()),
        "compiler": str(library.get("compiler", "none")),
        "processor": _processor(),
        "features": " ".join(sorted(filter(FEATURES.match, processor_features()))),
        "caches": _caches(),
        "processors": str(os.cpu_count()),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "code_path": native.cpu_path() if library else "none",
        "amx": str(native.amx()) if library else "none",
        "threads": str(torch.get_num_threads()),
        "variables": " ".join(variables),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        found = dict(re.findall(r"^(vendor_id|cpu family|model)\s*: (.*)$", text, re.MULTILINE))
        if found:
            return " ".join([platform.machine(), *found.values()])
    return f"{platform.machine()} {platform.processor()}"


def _caches() -> str:
    places = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    return " ".join(place.read_text().strip() for place in places)


def images() -> None:
    """In this process ``cifar100``, for which recipes have normalizations, is 40 random images for training
    and 40 for testing.
    """
    from fastkd import data

    draws = torch.Generator().manual_seed(18)
    parts = [torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8, generator=draws) for _ in range(2)]
    labels = torch.arange(40) * 2
    found = data.Dataset(
        "cifar100", 100, (0.5,) * 3, (0.25,) * 3, True, parts[0], labels, parts[1], labels.flip(0)
    )
    data._LOADERS["cifar100"] = lambda root: found


def digests(recipe: str, *flags: str) -> dict[str, str]:
    """SHA-256 of the student's last weights, and of what both trainings said of each epoch."""
    from fastkd.training.cli import main

    weights, losses = hashlib.sha256(), hashlib.sha256()
    with tempfile.TemporaryDirectory() as output:
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            status = main(["--recipe", recipe, *FLAGS, "--output", output, *flags])
        if status:
            raise RuntimeError(f"recipe {recipe} ends with status {status}: {said.getvalue()}")
        (folder,) = Path(output).glob("at+fsp+kd-*")
        (teacher,) = Path(output).glob("teacher-*")
        add_weights(weights, torch.load(folder / "last.pt", weights_only=True)["model"])
        for path in (teacher / "epochs.csv", folder / "init.csv", folder / "epochs.csv"):
            if path.exists():  # a recipe may have no first phase
                with open(path, newline="") as file:
                    for row in csv.DictReader(file):
                        facts = {key: value for key, value in row.items() if key not in CLOCKED}
                        losses.update(f"{path.name} {json.dumps(facts)}\n".encode())
    return {"weights": weights.hexdigest(), "losses": losses.hexdigest()}


def add_weights(digest: Any, state: dict[str, torch.Tensor]) -> None:
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def table() -> list[dict[str, Any]]:
    """The entries: {"machine": facts, "digests": {recipe: digests}}."""
    return json.loads(TABLE.read_text()) if TABLE.exists() else []


def differing(facts: dict[str, str], entries: list[dict[str, Any]]) -> list[str]:
    """How the entry nearest to this machine differs from it, a sentence each; nothing if one is its own."""
    each = [
        [
            f"{name} is {facts.get(name, '')!r}, there {entry['machine'].get(name, '')!r}"
            for name in sorted({*facts, *entry["machine"]})
            if facts.get(name) != entry["machine"].get(name)
        ]
        for entry in entries
    ]
    return min(each, key=len, default=["the table is empty"])


def ask(function: str, *arguments: str) -> Any:
    """What a function of this file returns in a process of its own, with one thread."""
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    outside = dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID"))
    code = f"import json, digests; print(json.dumps(digests.{function}(*{arguments!r})))"
    with tempfile.TemporaryDirectory() as folder:
        answer = python(code, cwd=folder, PYTHONPATH=paths, **outside)
    if answer.returncode:
        raise RuntimeError(answer.stderr)
    return json.loads(answer.stdout.splitlines()[-1])


def of_recipes(*jobs: str) -> dict[str, dict[str, str]]:
    """The digests of each job: the name of a recipe, perhaps followed by flags."""
    torch.set_num_threads(1)
    images()
    return {job: digests(*job.split()) for job in jobs}


def main() -> int:
    sys.path.insert(0, str(ROOT))
    from fastkd.training import RECIPES

    facts, found, again = ask("machine"), ask("of_recipes", *RECIPES), ask("of_recipes", *reversed(RECIPES))
    if found != again:
        print("two runs of this machine differ: nothing is written", file=sys.stderr)
        return 1
    entries = [entry for entry in table() if entry["machine"] != facts]
    TABLE.write_text(json.dumps([*entries, {"machine": facts, "digests": found}], indent=2) + "\n")
    print(f"{TABLE}: digests of {', '.join(found)}; entry {len(entries) + 1}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
