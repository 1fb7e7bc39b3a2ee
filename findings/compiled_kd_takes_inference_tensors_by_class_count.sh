#!/usr/bin/env bash
# Whether torch.compile takes a teacher's logits from inference_mode depends on the number of classes.
#
# The distillation loss KL(softmax(teacher / T), log_softmax(student / T)), with teacher logits that were made
# under torch.inference_mode(), works in eager mode for every number of classes. Compiled, it works for 5, 10
# and 16 classes and raises for 2, 31, 32 and 100: "Inference tensors cannot be saved for backward". The
# compiler decides by size whether the backward pass saves the teacher's logits or a tensor made from them.
# So the same code runs for CIFAR-10 and fails for CIFAR-100. A C++ compiler is needed.
#
# Seen with torch 2.13.0 (also 2.14.1) on 2026-11-28:
#   2 classes: eager works, compiled RuntimeError
#   5 classes: eager works, compiled works
#   10 classes: eager works, compiled works
#   16 classes: eager works, compiled works
#   31 classes: eager works, compiled RuntimeError
#   32 classes: eager works, compiled RuntimeError
#   100 classes: eager works, compiled RuntimeError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
cd "$folder"
TORCHINDUCTOR_CACHE_DIR="$folder/inductor" "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
import torch.nn.functional as F


def kd(student, teacher):
    return F.kl_div(F.log_softmax(student / 4, 1), F.softmax(teacher / 4, 1), reduction="batchmean") * 16


def outcome(loss, classes):
    student = torch.randn(8, classes, requires_grad=True)
    with torch.inference_mode():
        teacher = torch.randn(8, classes)
    try:
        loss(student, teacher).backward()
    except RuntimeError as error:
        assert "Inference tensors cannot be saved for backward" in str(error)
        return "RuntimeError"
    return "works"


print(f"torch {torch.__version__}")
wanted = {2: "RuntimeError", 5: "works", 10: "works", 16: "works", 31: "RuntimeError", 32: "RuntimeError", 100: "RuntimeError"}
for classes, compiled in wanted.items():
    torch._dynamo.reset()  # each size as if it came first
    seen = outcome(kd, classes), outcome(torch.compile(kd), classes)
    print(f"{classes} classes: eager {seen[0]}, compiled {seen[1]}")
    assert seen == ("works", compiled), "the behaviour changed"
PYTHON
