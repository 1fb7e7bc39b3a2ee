#!/usr/bin/env bash
# Until Triton 3.9 the interpreter rounds twice in tl.fma, so that the rounding error of a product is always zero.
#
# fma(a, b, -(a * b)) is the error that rounding made in a * b, exactly: what compensated sums and products split in two
# numbers are built on. A compiled kernel has one fma.rn.f32 for it. With TRITON_INTERPRET=1 the fma of 3.6 to 3.8 is
# NumPy's a * b + c, which rounds the product too, and the error is zero for every input. A compensated algorithm then
# silently becomes the plain one: a test against float64 finds errors that a GPU would not make, and a test of the
# correction itself finds nothing to correct. Triton 3.9 rounds once. No GPU is needed.
#
# Seen with torch 2.13.0 and triton 3.6.0, 3.8.0 and 3.9.0 on 2026-11-30:
#   triton 3.6.0
#   interpreted: 0 of 1024 products have an error; 1024 have one by float64
#   compiled for sm_90: fma.rn.f32
#   triton 3.8.0
#   (the same two lines)
#   triton 3.9.0
#   interpreted: 1024 of 1024 products have an error; 1024 have one by float64
#   compiled for sm_90: fma.rn.f32
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
cat > "$folder/probe.py" <<'PYTHON'
import os

import torch
import triton
import triton.language as tl


@triton.jit
def error_of_product(a, b, out, count: tl.constexpr):
    i = tl.arange(0, count)
    x, y = tl.load(a + i), tl.load(b + i)
    tl.store(out + i, tl.fma(x, y, -(x * y)))


if os.environ.get("TRITON_INTERPRET") == "1":
    a, b = torch.rand(2, 1024, generator=torch.Generator().manual_seed(0))
    found = torch.empty_like(a)
    error_of_product[(1,)](a, b, found, 1024)
    exact = a.double() * b.double() - (a * b).double()
    print("triton", triton.__version__)
    print(f"interpreted: {int((found != 0).sum())} of 1024 products have an error;", end=" ")
    print(f"{int((exact != 0).sum())} have one by float64")
else:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {"a": "*fp32", "b": "*fp32", "out": "*fp32", "count": "constexpr"}
    source = ASTSource(error_of_product, types, {"count": 1024})
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    print("compiled for sm_90:", "fma.rn.f32" if "fma.rn.f32" in ptx else "no fma")
PYTHON
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
cd "$folder"
export TRITON_CACHE_DIR="$folder/cache"
seen=
for version in 3.6.0 3.8.0 3.9.0; do
  "$folder/venv/bin/pip" install --quiet --disable-pip-version-check triton==$version
  seen+=$(TRITON_INTERPRET=1 "$folder/venv/bin/python" -W ignore probe.py)$'\n'
  seen+=$("$folder/venv/bin/python" -W ignore probe.py)$'\n'
done
echo "$seen"
products="of 1024 products have an error; 1024 have one by float64
compiled for sm_90: fma.rn.f32"
expected="triton 3.6.0
interpreted: 0 $products
triton 3.8.0
interpreted: 0 $products
triton 3.9.0
interpreted: 1024 $products
"
[ "$seen" = "$expected" ] || { echo "the behaviour changed" >&2; exit 1; }
