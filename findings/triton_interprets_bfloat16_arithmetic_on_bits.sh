#!/usr/bin/env bash
# Triton's interpreter adds, multiplies and compares bfloat16 numbers by their bit patterns.
#
# NumPy has no bfloat16, so with TRITON_INTERPRET=1 a block of bfloat16 is an array of uint16, and arithmetic on it is
# NumPy's for uint16: 1 + 2 is infinity, 1 * 2 is 0, a sum of 256 and seven ones is 0, and of 0.5 and -1 the -1 counts
# as greater. Nothing is said. A kernel compiled for sm_90 adds such numbers with add.bf16, and float16 is right in both.
# What is first converted to float32 is right in the interpreter too, apart from conversions that truncate: a kernel has
# to be written that way to be tested without a GPU.
#
# Seen with torch 2.13.0 and triton 3.6.0 and 3.9.0 on 2026-11-30 (3.8.0 gives the same):
#   triton 3.6.0
#   bfloat16: 1 + 2 = inf, 1 * 2 = 0, -1 > 0.5 is True, 256 and seven ones are 0
#   float16: 1 + 2 = 3, 1 * 2 = 2, -1 > 0.5 is False, 256 and seven ones are 263
#   triton 3.9.0
#   (the same two lines)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
cat > "$folder/probe.py" <<'PYTHON'
import torch
import triton
import triton.language as tl


@triton.jit
def calculate(x, y, added, multiplied, greater, total, count: tl.constexpr):
    i = tl.arange(0, count)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(added + i, a + b)
    tl.store(multiplied + i, a * b)
    tl.store(greater + i, (a > b).to(tl.int32))
    tl.store(total, tl.sum(a))


print("triton", triton.__version__)
for dtype in (torch.bfloat16, torch.float16):
    x = torch.tensor([256.0, 1, 1, 1, 1, 1, 1, 1], dtype=dtype)
    y = torch.full_like(x, 2)
    added, multiplied, greater = torch.empty_like(x), torch.empty_like(x), torch.empty(8, dtype=torch.int32)
    total = torch.empty(1, dtype=dtype)
    calculate[(1,)](x, y, added, multiplied, greater, total, 8)
    words = f"{str(dtype)[6:]}: 1 + 2 = {added[1]:g}, 1 * 2 = {multiplied[1]:g}"
    all_of = f"256 and seven ones are {total.item():g}"
    calculate[(1,)](torch.full_like(x, -1), torch.full_like(x, 0.5), added, multiplied, greater, total, 8)
    print(f"{words}, -1 > 0.5 is {bool(greater[0])}, {all_of}")
PYTHON
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
cd "$folder"
seen=
for version in 3.6.0 3.9.0; do
  "$folder/venv/bin/pip" install --quiet --disable-pip-version-check triton==$version
  seen+=$(TRITON_INTERPRET=1 "$folder/venv/bin/python" -W ignore probe.py)$'\n'
done
echo "$seen"
same="bfloat16: 1 + 2 = inf, 1 * 2 = 0, -1 > 0.5 is True, 256 and seven ones are 0
float16: 1 + 2 = 3, 1 * 2 = 2, -1 > 0.5 is False, 256 and seven ones are 263"
expected="triton 3.6.0
$same
triton 3.9.0
$same
"
[ "$seen" = "$expected" ] || { echo "the behaviour changed" >&2; exit 1; }
