#!/usr/bin/env bash
# torchdistill 1.1.5's CRDLoss cannot draw negatives itself, though its rows of negatives are optional.
#
# CRDLoss reads 'contrast_idx' by dict.get, and where it is missing is to draw negatives by the alias method, as
# RepDistiller's criterion does. That code reads an attribute under another name than the one that holds the
# probabilities, so it ends with an AttributeError. With rows given, as torchdistill's own dataset wrapper does, the
# loss is computed.
#
# Seen with torchdistill 1.1.5, torch 2.14.1 and torchvision 0.29.1 on 2026-11-29:
#   contrast_idx given: a finite loss
#   contrast_idx missing: AttributeError, 'CRDLoss' object has no attribute 'prob'
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/probe.py" <<'PYTHON'
import torch
from torchdistill.losses.mid_level import CRDLoss

BATCH, WIDTH, SAMPLES, NEGATIVES = 4, 8, 32, 5
torch.manual_seed(0)
positives = torch.arange(BATCH)
rows = torch.cat([positives[:, None], torch.randint(0, SAMPLES, (BATCH, NEGATIVES))], dim=1)
for name, supplement in {
    "given": {"pos_idx": positives, "contrast_idx": rows},
    "missing": {"pos_idx": positives},
}.items():
    criterion = CRDLoss("norm", "empty", "norm", WIDTH, SAMPLES, NEGATIVES, SAMPLES)
    student, teacher = (
        {"norm": {"output": torch.nn.functional.normalize(torch.randn(BATCH, WIDTH))}, "empty": {"input": supplement}}
        for _ in range(2)
    )
    try:
        outcome = "a finite loss" if criterion(student, teacher).isfinite().all() else "not finite"
    except AttributeError as error:
        outcome = f"AttributeError, {str(error).split('. ')[0]}"
    print(f"contrast_idx {name}: {outcome}")
PYTHON
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torchdistill==1.1.5 torch==2.14.1 torchvision==0.29.1
seen=$(cd "$folder" && venv/bin/python -W ignore probe.py 2>/dev/null)
echo "$seen"
expected="contrast_idx given: a finite loss
contrast_idx missing: AttributeError, 'CRDLoss' object has no attribute 'prob'"
[ "$seen" = "$expected" ] || { echo "the behaviour changed" >&2; exit 1; }
