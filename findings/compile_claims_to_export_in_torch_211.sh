#!/usr/bin/env bash
# In PyTorch 2.11, torch.compiler.is_exporting() is True inside every graph of torch.compile.
#
# Its documentation gives it to tell torch.export from torch.compile, and so code takes a plainer branch where
# it is True (no custom operator, no state that a package could not hold). In 2.11 the tracer of torch.compile
# answers True as well: the plain branch is then compiled in training too, without a word, and what the other
# branch was written for never runs. In 2.13 and 2.14 the compiled graph has False and the exported one True.
#
# Seen with torch 2.11.0 and 2.13.0 on 2026-11-29 (backend "eager", fullgraph=True):
#   2.11.0: eager False, compiled True, exported True
#   2.13.0: eager False, compiled False, exported True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/probe.py" <<'PYTHON'
import torch


class Probe(torch.nn.Module):
    def forward(self, x):
        return x + (1 if torch.compiler.is_exporting() else 0)


probe, zero = Probe(), torch.zeros(1)
found = {
    "eager": probe(zero),
    "compiled": torch.compile(probe, backend="eager", fullgraph=True)(zero),
    "exported": torch.export.export(probe, (zero,)).module()(zero),
}
print(f"{torch.__version__.split('+')[0]}: " + ", ".join(f"{how} {bool(value)}" for how, value in found.items()))
PYTHON
seen=
for version in 2.11.0 2.13.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet --disable-pip-version-check "torch==$version"
  seen+=$(cd "$folder" && "$folder/$version/bin/python" -W ignore probe.py)$'\n'
  rm -rf "${folder:?}/$version"
done
printf '%s' "$seen"
expected='2.11.0: eager False, compiled True, exported True
2.13.0: eager False, compiled False, exported True
'
[ "$seen" = "$expected" ] || { echo "the behaviour changed" >&2; exit 1; }
