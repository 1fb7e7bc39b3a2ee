"""What ran a measurement: processor, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import fastkd
from fastkd import native

ROOT = Path(__file__).resolve().parents[2]
FLAGS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "asimd",
    "sve",
    "bf16",
)


def _cpuinfo() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    info = _cpuinfo()
    model = info.get("model name") or platform.processor() or platform.machine() or "unknown processor"
    # virtual machines hide the number, and one name then stands for several generations
    if not re.search(r"\d", model) and "model" in info:
        model += f" family {info.get('cpu family')} model {info['model']}"
    return model


def slug(name: str) -> str:
    """A folder's name."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", " ", name.lower())).strip("-")


def facts(command: list[str]) -> dict[str, Any]:
    """All that a reader needs to judge a figure, as plain data."""
    flags = set((_cpuinfo().get("flags") or _cpuinfo().get("Features") or "").split())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    commit = _git("rev-parse", "HEAD")
    return {
        "device": cpu_model(),
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "machine": {
            "cpu": cpu_model(),
            "flags": [flag for flag in FLAGS if flag in flags],
            "cores": cores(),
            "memory_gib": round(memory / 2**30, 1),
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "libc": " ".join(platform.libc_ver()).strip(),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "fastkd": fastkd.__version__,
            "pytest-benchmark": version("pytest-benchmark"),
        },
        "cpu_path": native.cpu_path() if native.CPU.available else None,
        "threads": torch.get_num_threads(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": ["python -m pytest" if command[:1] == ["__main__.py"] else command[0], *command[1:]],
        "commit": (
            commit and commit + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
        ),
    }
