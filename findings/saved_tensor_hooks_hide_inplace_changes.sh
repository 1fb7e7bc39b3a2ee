#!/usr/bin/env bash
# An in-place change of a saved tensor goes unseen under saved-tensor hooks, and the gradient is wrong.
#
# y = x * x needs x in its backward pass. Changing x in place in between makes backward raise ("one of the
# variables needed for gradient computation has been modified by an inplace operation"). Inside
# saved_tensors_hooks, with hooks that return what they get, no error comes: backward reads the changed x.
# save_on_cpu() does the same for tensors that are on the CPU already, since its copy is no copy there.
#
# Seen with torch 2.13.0 (also 2.14.1) on 2026-11-28; the right gradient is 4:
#   no hooks: RuntimeError
#   saved_tensors_hooks that return their argument: 40.0
#   save_on_cpu: 40.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
cd "$folder"
TORCHINDUCTOR_CACHE_DIR="$folder/inductor" "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import contextlib

import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks


def gradient(context):
    w = torch.tensor([2.0], requires_grad=True)
    x = w * 1
    with context:
        y = x * x
    with torch.no_grad():
        x.mul_(10)
    try:
        y.backward()
    except RuntimeError:
        return "RuntimeError"
    return w.grad.item()


seen = {
    "no hooks": gradient(contextlib.nullcontext()),
    "saved_tensors_hooks that return their argument": gradient(saved_tensors_hooks(lambda x: x, lambda x: x)),
    "save_on_cpu": gradient(save_on_cpu()),
}
print(f"torch {torch.__version__}; the right gradient is 4")
for name, value in seen.items():
    print(f"{name}: {value}")
assert list(seen.values()) == ["RuntimeError", 40.0, 40.0], "the behaviour changed"
PYTHON
