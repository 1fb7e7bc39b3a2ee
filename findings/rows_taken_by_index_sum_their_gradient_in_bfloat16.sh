#!/usr/bin/env bash
# On a CPU, which way a row is looked up decides whether its bfloat16 gradient is right or stops at 256.
#
# centers[labels] gives each image its class's center, and the center's gradient is the sum over its images. In bfloat16
# that sum is made in bfloat16, in which 256 + 1 is 256: of 1024 equal gradients a quarter arrives. F.embedding does the
# same. index_select and gather, which give the same rows, sum in float32 and are right. torch.compile turns it around
# for two of them: embedding is right then, and gather, right in eager mode, is wrong. So neither a rewritten lookup nor
# a compiled step leaves the gradients as they were. A C++ compiler is needed.
#
# Seen with torch 2.13.0 on 2026-11-30 (2.14.1 and 2.15.0 give the same), one thread, one row taken 1024 times, each
# with the gradient 1:
#   centers[labels]: eager 256, compiled 256
#   embedding: eager 256, compiled 1024
#   index_select: eager 1024, compiled 1024
#   gather: eager 1024, compiled 256
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/probe.py" <<'PYTHON'
import torch
import torch.nn.functional as F

torch.set_num_threads(1)
labels = torch.zeros(1024, dtype=torch.long)
ways = {
    "centers[labels]": lambda centers: centers[labels],
    "embedding": lambda centers: F.embedding(labels, centers),
    "index_select": lambda centers: centers.index_select(0, labels),
    "gather": lambda centers: centers.gather(0, labels[:, None].expand(-1, 8)),
}
for name, way in ways.items():
    sums = []
    for function in (way, torch.compile(way)):
        centers = torch.randn(4, 8).bfloat16().requires_grad_()
        function(centers).sum().backward()
        assert (centers.grad[0] == centers.grad[0, 0]).all() and not centers.grad[1:].any()
        sums.append(centers.grad[0, 0].item())
    print("{}: eager {:g}, compiled {:g}".format(name, *sums))
PYTHON
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
seen=$(cd "$folder" && TORCHINDUCTOR_CACHE_DIR="$folder/inductor" venv/bin/python -W ignore probe.py)
echo "$seen"
expected="centers[labels]: eager 256, compiled 256
embedding: eager 256, compiled 1024
index_select: eager 1024, compiled 1024
gather: eager 1024, compiled 256"
[ "$seen" = "$expected" ] || { echo "the behaviour changed" >&2; exit 1; }
