#!/usr/bin/env bash
# PyTorch 2.13.0: what checkpointing computes again loses the caller's context variables 61 levels deep.
#
# A backward pass within a backward pass runs in the caller's thread, up to sixty of them. The next one is
# handed to a thread of autograd's pool. A contextvars.ContextVar that the caller has set holds its default
# there, so nested reentrant checkpoints compute their forward pass again with another setting than at first,
# without a word: of 61 levels the innermost, of more the innermost ones. (On a GPU autograd's thread for the
# device is such a thread at the first level.) What a library keeps in a ContextVar, it has to hand to these
# threads itself. No GPU is needed.
#
# Seen on 2026-11-29:
#   torch 2.13.0: 60 levels: all see the caller's value
#   torch 2.13.0: 61 levels: 1 sees the default, in another thread
#   torch 2.13.0: 70 levels: 10 see the default, in another thread
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
cat > "$folder/levels.py" <<'PYTHON'
import contextvars
import threading

import torch
from torch.utils.checkpoint import checkpoint

setting = contextvars.ContextVar("setting", default="default")
lost = {}


def levels(x, depth):
    here = threading.current_thread() is threading.main_thread()
    if setting.get() != "the caller's":
        lost[depth] = here
    return x * 2 if depth == 0 else checkpoint(levels, x, depth - 1, use_reentrant=True)


setting.set("the caller's")
for depth, wanted in ((60, 0), (61, 1), (70, 10)):
    lost.clear()
    checkpoint(levels, torch.ones(1, requires_grad=True), depth, use_reentrant=True).backward()
    told = f"{len(lost)} see{'s' if len(lost) == 1 else ''} the default, in another thread"
    print(f"torch {torch.__version__.split('+')[0]}: {depth} levels:", told if lost else "all see the caller's value")
    assert sorted(lost) == list(range(wanted)) and not any(lost.values()), "the behaviour changed"
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/python" -W ignore "$folder/levels.py"
