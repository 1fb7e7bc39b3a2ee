#!/usr/bin/env bash
# Triton's interpreter makes subnormal bfloat16 numbers larger, in both directions of the conversion.
#
# bfloat16 has float32's exponents, so numbers below 2**-126 are subnormal in both, and a conversion from float32 has
# only to round the bits away. That is what a compiled kernel does (cvt.rn.bf16.f32 and a shift). With
# TRITON_INTERPRET=1 the conversion goes through a step for formats of different exponents, which shifts a subnormal
# number as if it had been renormalized: 1e-41, which rounds to 0, is stored as 9e-39, and a bfloat16 tensor that
# holds 1e-39 is loaded as 4.4e-39. Normal numbers are only truncated instead of rounded. So a tensor of tiny
# gradients, right on a GPU, fails under the interpreter by factors instead of by one unit of the last place. float16
# is converted by NumPy and is right. No GPU is needed.
#
# Seen with torch 2.13.0 and triton 3.6.0 and 3.9.0 on 2026-11-29 (3.8.0 gives the same):
#   triton 3.6.0
#   1e-38: stored 8.2e-39, rounded 1.0e-38; that one is loaded as 8.3e-39
#   1e-39: stored 4.2e-39, rounded 1.0e-39; that one is loaded as 4.4e-39
#   1e-41: stored 8.7e-39, rounded 0.0e+00; that one is loaded as 0.0e+00
#   triton 3.9.0
#   (the same three lines)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
cat > "$folder/probe.py" <<'PYTHON'
import torch
import triton
import triton.language as tl


@triton.jit
def convert(x, out, count: tl.constexpr):
    i = tl.arange(0, count)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


x = torch.tensor([1e-38, 1e-39, 1e-41, 0.0])
stored, loaded = torch.empty(4, dtype=torch.bfloat16), torch.empty(4)
convert[(1,)](x, stored, 4)
rounded = x.bfloat16()
convert[(1,)](rounded, loaded, 4)
print("triton", triton.__version__)
for number, *found in zip(x.tolist(), stored.tolist(), rounded.tolist(), loaded.tolist()):
    if number:
        print("{:.0e}: stored {:.1e}, rounded {:.1e}; that one is loaded as {:.1e}".format(number, *found))
PYTHON
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
cd "$folder"
seen=
for version in 3.6.0 3.9.0; do
  "$folder/venv/bin/pip" install --quiet --disable-pip-version-check triton==$version
  seen+=$(TRITON_INTERPRET=1 "$folder/venv/bin/python" -W ignore probe.py)$'\n'
done
echo "$seen"
same="1e-38: stored 8.2e-39, rounded 1.0e-38; that one is loaded as 8.3e-39
1e-39: stored 4.2e-39, rounded 1.0e-39; that one is loaded as 4.4e-39
1e-41: stored 8.7e-39, rounded 0.0e+00; that one is loaded as 0.0e+00"
expected="triton 3.6.0
$same
triton 3.9.0
$same
"
[ "$seen" = "$expected" ] || { echo "the behaviour changed" >&2; exit 1; }
