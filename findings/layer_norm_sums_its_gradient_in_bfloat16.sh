#!/usr/bin/env bash
# On a CPU, the gradients of LayerNorm's weight and bias are summed in bfloat16 and stop growing at 256 rows.
#
# The gradient of the bias is the sum of the incoming gradient over all rows, for a transformer images times tokens.
# Where the activations are bfloat16, the kernel adds row by row in bfloat16, in which 256 + 1 is 256. The weights need
# not be bfloat16: under autocast they are float32, their gradients are float32 tensors, and they hold the same wrong
# sum. With 64 images of 256 tokens it is a 64th of the right one, so the layers' own learning rate is, too. In float16
# the sum stops at 2048. BatchNorm and GroupNorm, which are the same arithmetic, are right, and so is LayerNorm compiled
# by torch.compile. Nothing is raised or warned of.
#
# Seen with torch 2.13.0 on one thread on 2026-11-30 (2.14.1 and 2.15.0 give the same), gradient of the bias divided by
# the number of rows, for an incoming gradient of ones; several threads have a sum each:
#   256 rows: layer_norm 1.000, under autocast 1.000, batch_norm 1.000, group_norm 1.000
#   1024 rows: layer_norm 0.250, under autocast 0.250, batch_norm 1.000, group_norm 1.000
#   16384 rows: layer_norm 0.016, under autocast 0.016, batch_norm 1.000, group_norm 1.000
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/probe.py" <<'PYTHON'
import torch
import torch.nn.functional as F

torch.set_num_threads(1)  # each thread has a sum of its own
torch.manual_seed(0)


def gradient(rows, call, dtype):
    weight = torch.ones(64, dtype=dtype, requires_grad=True)
    bias = torch.zeros(64, dtype=dtype, requires_grad=True)
    y = call(torch.randn(rows, 64).bfloat16(), weight, bias)
    assert y.dtype == torch.bfloat16
    y.backward(torch.ones_like(y))
    assert bias.grad.dtype == dtype
    return bias.grad.float().mean().item() / rows


def autocast(x, weight, bias):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.layer_norm(F.linear(x, torch.eye(64)), (64,), weight, bias)


for rows in (256, 1024, 16384):
    found = [
        gradient(rows, lambda x, w, b: F.layer_norm(x, (64,), w, b), torch.bfloat16),
        gradient(rows, autocast, torch.float32),
        gradient(rows, lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True), torch.bfloat16),
        gradient(rows, lambda x, w, b: F.group_norm(x, 1, w, b), torch.bfloat16),
    ]
    names = ("layer_norm", "under autocast", "batch_norm", "group_norm")
    print(f"{rows} rows:", ", ".join(f"{name} {value:.3f}" for name, value in zip(names, found)))
PYTHON
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
seen=$(cd "$folder" && venv/bin/python -W ignore probe.py)
echo "$seen"
expected="256 rows: layer_norm 1.000, under autocast 1.000, batch_norm 1.000, group_norm 1.000
1024 rows: layer_norm 0.250, under autocast 0.250, batch_norm 1.000, group_norm 1.000
16384 rows: layer_norm 0.016, under autocast 0.016, batch_norm 1.000, group_norm 1.000"
[ "$seen" = "$expected" ] || { echo "the behaviour changed" >&2; exit 1; }
