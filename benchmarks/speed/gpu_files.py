"""The summary and the archive of benchmarks/gpu.py, made while its parts write what goes into them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from speed.gpu_summary import speedups

UNPACKED = (".pt", ".tmp")  # weights, and what is being written


def packed(out: Path, staging: Path, summary: dict[str, Any]) -> None:
    """Completes the summary by what lies in ``staging`` and writes both, each whole and renamed.

    Raises:
        OSError: they cannot be written; those of the last time lie there.
    """
    for file in sorted(staging.glob("*.json")):
        with contextlib.suppress(ValueError):
            summary[file.stem] = json.loads(file.read_text(encoding="utf-8"))
    summary["speed"] = dict(speedups(staging))
    write(out / "gpu-summary.json", (json.dumps(summary, indent=1) + "\n").encode())
    archived = io.BytesIO()
    with tarfile.open(fileobj=archived, mode="w:gz") as archive:
        for path, content in contents(staging):
            info = tarfile.TarInfo(f"gpu-results/{path.as_posix()}")
            info.size, info.mtime = len(content), int(time.time())
            archive.addfile(info, io.BytesIO(content))
    write(out / "gpu-results.tar.gz", archived.getvalue())


def contents(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Its files, by paths within it. Parts write and rename meanwhile, so each is read at once, and one that
    is gone by then is passed over.
    """
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            file = Path(place, name)
            if not name.endswith(UNPACKED):
                with contextlib.suppress(FileNotFoundError):
                    yield file.relative_to(folder), file.read_bytes()


def write(target: Path, content: bytes) -> None:
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(target)
    except OSError:  # of a full disk, what was written takes room from the log
        temporary.unlink(missing_ok=True)
        raise
