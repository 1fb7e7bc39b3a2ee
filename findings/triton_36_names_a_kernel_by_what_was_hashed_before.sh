#!/usr/bin/env bash
# Triton 3.6.0: a kernel's key in the cache depends on which functions were hashed before it in the process.
#
# Into the key of a @triton.jit function go the tl.constexpr globals that it and its callees read. A callee
# that has no key yet is asked for its globals before they have been collected, so they are left out. The key is
# another one if the callee was hashed before, say for another kernel that calls it too. A process that uses
# kernels in another order then does not find a compiled kernel in the cache on disk. 3.8.0 hashes the callee
# first. Hashing callees before callers (reading their `cache_key`) gives one key in 3.6.0 too. No GPU is
# needed.
#
# Seen on 2026-11-29:
#   triton 3.6.0: keys of one kernel differ, with callees first they are equal
#   triton 3.8.0: keys of one kernel are equal, with callees first they are equal
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
cat > "$folder/keys.py" <<'PYTHON'
import triton
import triton.language as tl

FOUR = tl.constexpr(4)


@triton.jit
def callee(x):
    return x + FOUR


@triton.jit
def kernel(x):
    tl.store(x, callee(tl.load(x)))


def key(*first):
    for function in (callee, kernel):  # as in a new process
        function.hash, function.used_global_vals = None, {}
    for function in first:
        function.cache_key
    return kernel.cache_key


alone, after = key(), key(callee)
wanted = {"3.6.0": "differ", "3.8.0": "are equal"}[triton.__version__]
seen = "are equal" if alone == after else "differ"
settled = "equal" if key(callee) == after else "different"
print(f"triton {triton.__version__}: keys of one kernel {seen}, with callees first they are {settled}")
assert (seen, settled) == (wanted, "equal"), "the behaviour changed"
PYTHON
cd "$folder"
for version in 3.6.0 3.8.0; do
  "$folder/venv/bin/pip" install --quiet --disable-pip-version-check triton==$version
  "$folder/venv/bin/python" -W ignore keys.py
done
