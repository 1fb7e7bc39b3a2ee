#!/usr/bin/env bash
# torch.func.jvp of a float32 scalar times a Python number gives a float64 tangent.
#
# The primal output is float32, as type promotion has it. The tangent of the same operation is float64 if the
# input has no dimensions; it is float32 for an input of one dimension, and in forward mode by
# torch.autograd.forward_ad. A float64 tangent then promotes whatever it meets next.
#
# Seen with torch 2.13.0 (also 2.14.1) on 2026-11-28:
#   jvp of x * 2.0, x without dimensions: output float32, tangent float64
#   jvp of x + 2.0, x without dimensions: output float32, tangent float64
#   jvp of x * 2.0, x of 3 numbers: output float32, tangent float32
#   forward_ad of x * 2.0, x without dimensions: output float32, tangent float32
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
cd "$folder"
TORCHINDUCTOR_CACHE_DIR="$folder/inductor" "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from torch.autograd import forward_ad


def dtypes(function, x):
    output, tangent = torch.func.jvp(function, (x,), (torch.ones_like(x),))
    return [str(y.dtype).removeprefix("torch.") for y in (output, tangent)]


scalar, vector = torch.tensor(1.0), torch.ones(3)
seen = {
    "jvp of x * 2.0, x without dimensions": dtypes(lambda x: x * 2.0, scalar),
    "jvp of x + 2.0, x without dimensions": dtypes(lambda x: x + 2.0, scalar),
    "jvp of x * 2.0, x of 3 numbers": dtypes(lambda x: x * 2.0, vector),
}
with forward_ad.dual_level():
    dual = forward_ad.unpack_dual(forward_ad.make_dual(scalar, scalar) * 2.0)
    name = "forward_ad of x * 2.0, x without dimensions"
    seen[name] = [str(y.dtype).removeprefix("torch.") for y in (dual.primal, dual.tangent)]
print(f"torch {torch.__version__}")
for name, (output, tangent) in seen.items():
    print(f"{name}: output {output}, tangent {tangent}")
assert [tangent for _, tangent in seen.values()] == ["float64", "float64", "float32", "float32"], "the behaviour changed"
assert {output for output, _ in seen.values()} == {"float32"}, "the behaviour changed"
PYTHON
