#!/usr/bin/env bash
# A function compiled by inductor reads a negative view with the wrong sign, without a word.
#
# z.conj().imag is a view of z whose "negative bit" is set: the memory holds the numbers with the other sign,
# and eager operators negate them when they read. The kernels that torch.compile makes read the memory as it
# is when such a view is given to the compiled function. Made inside the compiled function, it is right.
# A C++ compiler is needed.
#
# Seen with torch 2.13.0 (also 2.14.1) on 2026-11-28, largest difference from eager for 8 numbers:
#   a negative view given to the compiled function: 8.97
#   the view made inside the compiled function: 0.00
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
cd "$folder"
TORCHINDUCTOR_CACHE_DIR="$folder/inductor" "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch

torch.manual_seed(0)
z = torch.randn(8, dtype=torch.complex64)
view = z.conj().imag
assert view.is_neg()
outside = torch.compile(lambda x: x * 3 + 1)(view) - (view * 3 + 1)
inside = torch.compile(lambda z: z.conj().imag * 3 + 1)(z) - (view * 3 + 1)
print(f"torch {torch.__version__}, largest difference from eager for {len(z)} numbers")
print(f"a negative view given to the compiled function: {outside.abs().max():.2f}")
print(f"the view made inside the compiled function: {inside.abs().max():.2f}")
# 3 (-x) + 1 instead of 3 x + 1
assert torch.allclose(outside, -6 * view, atol=1e-5) and inside.abs().max() < 1e-5, "the behaviour changed"
PYTHON
