#!/usr/bin/env bash
# On a CPU, group norm of a channels_last float32 tensor loses the variance where the mean is large.
#
# F.group_norm of numbers of mean 1000 and deviation 1, in two groups. A contiguous tensor comes out right to
# 1e-4. The same numbers in channels_last are off by up to a whole deviation: the kernel for that layout takes
# the variance as the difference of the mean square and the squared mean, in float32. With mean 100 its error
# is 3e-3, some 300 times that of the contiguous kernel. So `network.to(memory_format=torch.channels_last)`,
# which changes no value by itself, changes what a network with GroupNorm computes.
#
# Seen with torch 2.13.0 (also 2.14.1) on 2026-11-29, largest error against float64:
#   mean 100: contiguous 9.9e-06, channels_last 2.9e-03
#   mean 1000: contiguous 9.0e-05, channels_last 1.0e+00
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
import torch.nn.functional as F

print(f"torch {torch.__version__}, largest error against float64")
found = {}
for mean in (100, 1000):
    torch.manual_seed(0)
    x = torch.randn(2, 8, 16, 16, dtype=torch.float64) + mean
    exact = F.group_norm(x, 2)
    for layout in (torch.contiguous_format, torch.channels_last):
        y = F.group_norm(x.float().contiguous(memory_format=layout), 2)
        found[mean, layout] = (y.double() - exact).abs().max().item()
    print(f"mean {mean}: " + ", ".join(
        f"{str(layout).removeprefix('torch.').removesuffix('_format')} {found[mean, layout]:.1e}"
        for layout in (torch.contiguous_format, torch.channels_last)
    ))
assert found[1000, torch.contiguous_format] < 1e-3, "the behaviour changed"
assert found[100, torch.channels_last] > 1e-3 and found[1000, torch.channels_last] > 0.1, "the behaviour changed"
PYTHON
