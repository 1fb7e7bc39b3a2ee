#!/usr/bin/env bash
# Compiled, F.smooth_l1_loss gives an element that is NaN the gradient 0; eager, it gives it NaN.
#
# GradScaler and checks of the gradient's norm find a broken step by NaN among the gradients. In eager mode
# smooth_l1_loss, which relational distillation uses, passes NaN on, as mse_loss and huber_loss do. torch.compile
# splits its backward pass into a choice between sign(difference) and difference / beta; NaN is not smaller than beta,
# and the sign of NaN is 0. The loss is NaN, the gradients are finite, and a step that should be skipped is taken.
# F.l1_loss, whose gradient is the sign too, does that in eager mode already. A C++ compiler is needed.
#
# Seen with torch 2.13.0 on a CPU on 2026-11-29; 2.14.1 gives the same. Input [NaN, 2, 0.5], target 0, summed:
#   l1_loss: loss nan, eager [0.0, 1.0, 1.0], compiled [0.0, 1.0, 1.0]
#   smooth_l1_loss: loss nan, eager [nan, 1.0, 0.5], compiled [0.0, 1.0, 0.5]
#   huber_loss: loss nan, eager [nan, 1.0, 0.5], compiled [nan, 1.0, 0.5]
#   mse_loss: loss nan, eager [nan, 4.0, 1.0], compiled [nan, 4.0, 1.0]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/probe.py" <<'PYTHON'
import torch
import torch.nn.functional as F

for name in ("l1_loss", "smooth_l1_loss", "huber_loss", "mse_loss"):
    function = getattr(F, name)

    def summed(x):
        return function(x, torch.zeros(3), reduction="sum")

    torch.compiler.reset()
    gradients = []
    for way in (summed, torch.compile(summed)):
        x = torch.tensor([float("nan"), 2.0, 0.5], requires_grad=True)
        loss = way(x)
        loss.backward()
        gradients.append(x.grad.tolist())
    print(f"{name}: loss {loss.item()}, eager {gradients[0]}, compiled {gradients[1]}")
PYTHON
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
seen=$(cd "$folder" && TORCHINDUCTOR_CACHE_DIR="$folder/inductor" venv/bin/python -W ignore probe.py)
echo "$seen"
expected="l1_loss: loss nan, eager [0.0, 1.0, 1.0], compiled [0.0, 1.0, 1.0]
smooth_l1_loss: loss nan, eager [nan, 1.0, 0.5], compiled [0.0, 1.0, 0.5]
huber_loss: loss nan, eager [nan, 1.0, 0.5], compiled [nan, 1.0, 0.5]
mse_loss: loss nan, eager [nan, 4.0, 1.0], compiled [nan, 4.0, 1.0]"
[ "$seen" = "$expected" ] || { echo "the behaviour changed" >&2; exit 1; }
