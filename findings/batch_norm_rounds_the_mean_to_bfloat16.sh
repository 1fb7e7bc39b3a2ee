#!/usr/bin/env bash
# On a CPU, batch norm with bfloat16 parameters rounds the batch mean to bfloat16.
#
# F.batch_norm of a bfloat16 input of mean 100.2 and deviation 1. With float32 weight and bias ("mixed"), the
# outputs have mean 0, as they should. With bfloat16 weight and bias they are off by a fifth of a deviation:
# the batch mean 100.2 is held in bfloat16, whose numbers there are 100 and 100.5.
# So `network.to(torch.bfloat16)` and autocast, which leaves the parameters in float32, differ by far more
# than the rounding of their outputs.
#
# Seen with torch 2.13.0 (also 2.14.1) on 2026-11-28, mean of (output - exact output):
#   float32 parameters: 0.0002
#   bfloat16 parameters: 0.1948
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
cd "$folder"
TORCHINDUCTOR_CACHE_DIR="$folder/inductor" "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
import torch.nn.functional as F

torch.manual_seed(0)
x = (torch.randn(64, 4, 16, 16) + 100.2).bfloat16()
exact = F.batch_norm(x.double(), None, None, training=True)
print(f"torch {torch.__version__}, mean of (output - exact output)")
off = {}
for dtype in (torch.float32, torch.bfloat16):
    weight, bias = torch.ones(4, dtype=dtype), torch.zeros(4, dtype=dtype)
    off[dtype] = (F.batch_norm(x, None, None, weight, bias, training=True).double() - exact).mean().item()
    print(f"{str(dtype).removeprefix('torch.')} parameters: {off[dtype]:.4f}")
assert abs(off[torch.float32]) < 1e-3 and abs(off[torch.bfloat16]) > 0.05, "the behaviour changed"
PYTHON
