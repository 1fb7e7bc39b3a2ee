#!/usr/bin/env bash
# F.kl_div gives a teacher that is trained too NaN gradients once one of its probabilities is exactly 0.
#
# In mutual and online distillation the target of the KL divergence has a gradient. F.kl_div takes 0 log 0 for 0, so
# that the loss is right where a probability underflows (float32: about 104 below the largest logit). The gradient is
# not: log 0 + 1 is minus infinity, and softmax's backward multiplies it by the probability 0. Every logit of that row
# becomes NaN, not only the one that underflowed. With log_target=True the same loss has the right gradient, 0 to
# within rounding. The student's gradient is right in both.
#
# Seen with torch 2.13.0 on 2026-11-29; 2.14.1 gives the same:
#   probabilities: loss 0.6931, student's gradient [-0.5, 0.5], teacher's [nan, nan]
#   log-probabilities: loss 0.6931, student's gradient [-0.5, 0.5], teacher's [0.0, 0.0]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/probe.py" <<'PYTHON'
import torch
import torch.nn.functional as F

forms = {"probabilities": (F.softmax, False), "log-probabilities": (F.log_softmax, True)}
for name, (form, log_target) in forms.items():
    teacher = torch.tensor([[0.0, -200.0]], requires_grad=True)
    student = torch.tensor([[0.0, 0.0]], requires_grad=True)
    target = form(teacher, dim=1)
    loss = F.kl_div(F.log_softmax(student, dim=1), target, reduction="batchmean", log_target=log_target)
    loss.backward()
    gradients = [[round(value, 6) for value in x.grad[0].tolist()] for x in (student, teacher)]
    print(f"{name}: loss {loss.item():.4f}, student's gradient {gradients[0]}, teacher's {gradients[1]}")
PYTHON
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
seen=$(cd "$folder" && venv/bin/python probe.py)
echo "$seen"
expected="probabilities: loss 0.6931, student's gradient [-0.5, 0.5], teacher's [nan, nan]
log-probabilities: loss 0.6931, student's gradient [-0.5, 0.5], teacher's [0.0, 0.0]"
[ "$seen" = "$expected" ] || { echo "the behaviour changed" >&2; exit 1; }
