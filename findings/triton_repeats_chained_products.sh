#!/usr/bin/env bash
# Triton, sm_80: with more warps than blocks of 16 rows, two products in a chain are computed several times.
#
# A kernel of one tl.dot of 64x64 tiles, bfloat16, compiled for sm_80 with 8 warps, has as many mma.sync
# instructions as the product needs: instructions times warps times 16x8x16 is 64x64x64. If the result goes
# into a second tl.dot, all 8 warps are laid along the rows. A warp needs 16 of them, and there are 64: every
# product of the kernel, the first too, is then computed twice. Nothing says so; the results are right.
# With 4 warps it does not happen. No GPU is needed to see it.
#
# Seen with triton 3.8.0 on 2026-11-28, products made divided by products needed:
#   one tl.dot: 4 warps 1.0, 8 warps 1.0
#   two in a chain: 4 warps 1.0, 8 warps 2.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check triton==3.8.0
cat > "$folder/chain.py" <<'PYTHON'
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def single(a, b, c, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def chained(a, b, c, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i[None, :]
    first = tl.dot(tl.load(a + at), tl.load(b + at))
    tl.store(out + at, tl.dot(first.to(tl.bfloat16), tl.load(c + at)))


def made_by_needed(kernel, dots, warps, size=64):
    types = {"a": "*bf16", "b": "*bf16", "c": "*bf16", "out": "*fp32", "SIZE": "constexpr"}
    source = ASTSource(kernel, types, {"SIZE": size})
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": warps})
    return compiled.asm["ptx"].count("mma.sync") * warps * 16 * 8 * 16 / (dots * size**3)


print(f"triton {triton.__version__}, sm_80, products made divided by products needed")
seen = {}
for name, kernel, dots in (("one tl.dot", single, 1), ("two in a chain", chained, 2)):
    seen[name] = [made_by_needed(kernel, dots, warps) for warps in (4, 8)]
    print(f"{name}: 4 warps {seen[name][0]:.1f}, 8 warps {seen[name][1]:.1f}")
assert seen == {"one tl.dot": [1, 1], "two in a chain": [1, 2]}, "the behaviour changed"
PYTHON
cd "$folder"
TRITON_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" -W ignore chain.py
