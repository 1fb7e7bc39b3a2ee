#!/usr/bin/env bash
# tl.exp rounds its argument before it is used: the farther from zero, the more digits of the result are wrong.
#
# tl.exp(x) of float32 compiles to two instructions: the product of x and log2(e), rounded to float32, and 2 to that
# power. Half a unit in the last place of a product near 115 changes the power by 3e-6. At x = -80 that is some 60
# units in the last place of the result, where PyTorch's exp is right to about one. A softmax hides it, since its
# large terms are near exp(0); ratios of exponentials, likelihoods and comparisons with PyTorch do not. The interpreter
# (TRITON_INTERPRET=1) takes NumPy's exp and shows nothing of it. libdevice.exp splits its argument into a whole number
# and a rest, and has no such error. Below, the instructions are read from the PTX, and the effect of the two is
# computed in NumPy with an exact power of two. No GPU is needed.
#
# Seen with triton 3.6.0 and 3.9.0 on 2026-11-30 (3.8.0 gives the same):
#   triton 3.6.0
#   tl.exp: mul.f32 ex2.approx.f32
#   libdevice.exp: 4 fma before ex2
#   tl.exp is wrong by 0.8 units of the last place from -1 to 0, 7.7 from -10 to -9, 61.9 from -80 to -79
#   triton 3.9.0
#   (the same three lines)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
cat > "$folder/probe.py" <<'PYTHON'
import re

import numpy as np
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.language.extra.cuda import libdevice


@triton.jit
def plain(x, y, count: tl.constexpr):
    i = tl.arange(0, count)
    tl.store(y + i, tl.exp(tl.load(x + i)))


@triton.jit
def split(x, y, count: tl.constexpr):
    i = tl.arange(0, count)
    tl.store(y + i, libdevice.exp(tl.load(x + i)))


def instructions(kernel):
    types = {"x": "*fp32", "y": "*fp32", "count": "constexpr"}
    compiled = triton.compile(ASTSource(kernel, types, {"count": 128}), target=GPUTarget("cuda", 90, 32))
    return re.findall(r"^\s+((?:mul|fma|ex2)\S*f32)\s", compiled.asm["ptx"], re.MULTILINE)


def units(low):
    x = np.linspace(low, low + 1, 100001).astype(np.float32)
    found = np.exp2((x * np.float32(np.log2(np.e))).astype(np.float64))
    exact = np.exp(x.astype(np.float64))
    return (np.abs(found - exact) / np.spacing(exact.astype(np.float32))).max()


print("triton", triton.__version__)
print("tl.exp:", *instructions(plain))
before = " ".join(instructions(split)).partition("ex2")[0]
print("libdevice.exp:", before.count("fma"), "fma before ex2")
words = [f"{units(low):.1f} units of the last place from -1 to 0" if low == -1 else
         f"{units(low):.1f} from {low} to {low + 1}" for low in (-1, -10, -80)]
print("tl.exp is wrong by", ", ".join(words))
PYTHON
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check numpy
cd "$folder"
export TRITON_CACHE_DIR="$folder/cache"
seen=
for version in 3.6.0 3.9.0; do
  "$folder/venv/bin/pip" install --quiet --disable-pip-version-check triton==$version
  seen+=$("$folder/venv/bin/python" -W ignore probe.py)$'\n'
done
echo "$seen"
same="tl.exp: mul.f32 ex2.approx.f32
libdevice.exp: 4 fma before ex2
tl.exp is wrong by 0.8 units of the last place from -1 to 0, 7.7 from -10 to -9, 61.9 from -80 to -79"
expected="triton 3.6.0
$same
triton 3.9.0
$same
"
[ "$seen" = "$expected" ] || { echo "the behaviour changed" >&2; exit 1; }
