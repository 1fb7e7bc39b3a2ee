#!/usr/bin/env bash
# Triton 3.7.0 does not compile a device function that returns an element of a constant tuple.
#
# A @triton.jit function that returns CONFIG[0], for a tl.constexpr tuple CONFIG, may be used in arithmetic in
# 3.6.0 and again from 3.8.0 on. In 3.7.0 (and 3.7.1) the same kernel raises CompilationError at the place
# where the result is used. tl.cast(CONFIG[0], tl.int32) in the function compiles in all. No GPU is needed.
#
# Seen on 2026-11-28:
#   triton 3.7.0: CONFIG[0] CompilationError, tl.cast(CONFIG[0], tl.int32) compiles
#   triton 3.8.0: CONFIG[0] compiles, tl.cast(CONFIG[0], tl.int32) compiles
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
cat > "$folder/returned.py" <<'PYTHON'
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def bare(CONFIG: tl.constexpr):
    return CONFIG[0]


@triton.jit
def cast(CONFIG: tl.constexpr):
    return tl.cast(CONFIG[0], tl.int32)


@triton.jit
def uses_bare(x, CONFIG: tl.constexpr):
    tl.store(x + tl.arange(0, 16) * bare(CONFIG), 0.0)


@triton.jit
def uses_cast(x, CONFIG: tl.constexpr):
    tl.store(x + tl.arange(0, 16) * cast(CONFIG), 0.0)


def outcome(kernel):
    try:
        source = ASTSource(kernel, {"x": "*fp32", "CONFIG": "constexpr"}, {"CONFIG": (4,)})
        triton.compile(source, target=GPUTarget("cuda", 80, 32))
    except triton.CompilationError:
        return "CompilationError"
    return "compiles"


seen = outcome(uses_bare), outcome(uses_cast)
print(f"triton {triton.__version__}: CONFIG[0] {seen[0]}, tl.cast(CONFIG[0], tl.int32) {seen[1]}")
wanted = {"3.7.0": "CompilationError", "3.8.0": "compiles"}[triton.__version__]
assert seen == (wanted, "compiles"), "the behaviour changed"
PYTHON
cd "$folder"
for version in 3.7.0 3.8.0; do
  "$folder/venv/bin/pip" install --quiet --disable-pip-version-check triton==$version
  TRITON_CACHE_DIR="$folder/$version" "$folder/venv/bin/python" -W ignore returned.py
done
