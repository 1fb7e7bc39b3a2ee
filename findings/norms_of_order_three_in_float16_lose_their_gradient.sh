#!/usr/bin/env bash
# torch.linalg.vector_norm of order 3 or 4 has zero or NaN gradients in float16, at ordinary values.
#
# The norm itself is computed in float32 and is right. Its gradient is made of two tensors of the input's type,
# x |x|**(p - 2) and the incoming gradient over norm**(p - 1). In float16 the power of the norm overflows above 65504:
# for order 3 from a norm of 256 on, for order 4 from one of 40 on. The gradient is then 0, and once the first factor
# overflows too, NaN. Small norms end in NaN from the other side, by zero times infinity. F.normalize(x, p=3) goes
# through the same gradient and loses the term that keeps it at right angles to x. Order 2, bfloat16 and float32 are
# right at these values. Features of half precision that are normalized by another order than 2 are such a case.
#
# Seen with torch 2.13.0 on a CPU on 2026-11-29; 2.14.1 gives the same. 121 equal numbers, in float16:
#   order 2, 100.0: norm 1100, gradient 0.0909, wanted 0.0909
#   order 3, 1.0: norm 4.945, gradient 0.0409, wanted 0.0409
#   order 3, 100.0: norm 494.5, gradient 0.0000, wanted 0.0409
#   order 3, 500.0: norm 2474, gradient nan, wanted 0.0409
#   order 3, 0.0001: norm 0.0004945, gradient nan, wanted 0.0409
#   order 4, 30.0: norm 99.5, gradient 0.0000, wanted 0.0274
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/probe.py" <<'PYTHON'
import torch

for order, value in ((2, 100.0), (3, 1.0), (3, 100.0), (3, 500.0), (3, 1e-4), (4, 30.0)):
    gradients = []
    for dtype in (torch.float64, torch.float16):
        x = torch.full((121,), value, dtype=dtype, requires_grad=True)
        norm = torch.linalg.vector_norm(x, order)
        norm.backward()
        gradients.append(x.grad[0].item())
    wanted, gradient = gradients
    print(f"order {order}, {value}: norm {norm.item():.4g}, gradient {gradient:.4f}, wanted {wanted:.4f}")
PYTHON
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
seen=$(cd "$folder" && venv/bin/python probe.py)
echo "$seen"
expected="order 2, 100.0: norm 1100, gradient 0.0909, wanted 0.0909
order 3, 1.0: norm 4.945, gradient 0.0409, wanted 0.0409
order 3, 100.0: norm 494.5, gradient 0.0000, wanted 0.0409
order 3, 500.0: norm 2474, gradient nan, wanted 0.0409
order 3, 0.0001: norm 0.0004945, gradient nan, wanted 0.0409
order 4, 30.0: norm 99.5, gradient 0.0000, wanted 0.0274"
[ "$seen" = "$expected" ] || { echo "the behaviour changed" >&2; exit 1; }
