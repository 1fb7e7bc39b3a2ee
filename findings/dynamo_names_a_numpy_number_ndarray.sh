#!/usr/bin/env bash
# Inside a function that torch.compile traces, the type of a NumPy number has another name.
#
# type(numpy.float32(3)).__name__ is "float32". In a function under torch.compile it is "ndarray", since the
# number is traced as an array without dimensions. So a check of an argument by its type's name takes the
# other branch in the compiled function, without a break of the graph or a warning.
#
# Seen with torch 2.13.0 (also 2.14.1) and NumPy 2.4.6 on 2026-11-28:
#   eager: float32
#   compiled: ndarray
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
TORCHINDUCTOR_CACHE_DIR="$folder/inductor" "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import numpy
import torch


def name_of(x, number):
    name = type(number).__name__
    return x + {"float32": 1, "ndarray": 2}[name]


names = {1.0: "float32", 2.0: "ndarray"}
number, x = numpy.float32(3), torch.zeros(())
eager = names[name_of(x, number).item()]
compiled = names[torch.compile(name_of, backend="eager", fullgraph=True)(x, number).item()]
print(f"torch {torch.__version__}, NumPy {numpy.__version__}")
print(f"eager: {eager}")
print(f"compiled: {compiled}")
assert (eager, compiled) == ("float32", "ndarray"), "the behaviour changed"
PYTHON
