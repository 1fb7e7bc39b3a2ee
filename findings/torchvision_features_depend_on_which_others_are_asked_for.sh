#!/usr/bin/env bash
# What torchvision's create_feature_extractor gives for a node depends on which other nodes are asked for.
#
# resnet18's bn1 is followed by a ReLU that works in place. Asked for alone, "bn1" is the output of the norm, with
# negative numbers: what comes after it is cut off. Asked for together with any later node it is the output of the
# ReLU, since the tensor that is handed out was changed afterwards. Distillation before the ReLU, as of margins and of
# activation boundaries, tried out with one feature gives another loss once a second one is added, without a word. The
# node "relu" gives the same tensor then. AlexNet's, VGG's and GoogLeNet's convolutions and norms behave the same way.
#
# Seen with torchvision 0.29.1 and torch 2.14.1 on 2026-11-30, smallest number (0.29.2 and torch 2.15.0 give the same):
#   resnet18, bn1 alone: negative
#   resnet18, bn1 with layer4: 0.0
#   vgg11, features.0 alone: negative
#   vgg11, features.0 with features.2: 0.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/probe.py" <<'PYTHON'
import torch
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor

torch.manual_seed(0)
images = torch.randn(1, 3, 64, 64)
for make, node, later in ((models.resnet18, "bn1", "layer4"), (models.vgg11, "features.0", "features.2")):
    model = make().eval()
    for names in ([node], [node, later]):
        with torch.no_grad():
            smallest = create_feature_extractor(model, names)(images)[node].min().item()
        company = f"with {later}" if len(names) > 1 else "alone"
        print(f"{make.__name__}, {node} {company}: {'negative' if smallest < 0 else smallest}")
PYTHON
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 torchvision==0.29.1
seen=$(cd "$folder" && venv/bin/python -W ignore probe.py)
echo "$seen"
expected="resnet18, bn1 alone: negative
resnet18, bn1 with layer4: 0.0
vgg11, features.0 alone: negative
vgg11, features.0 with features.2: 0.0"
[ "$seen" = "$expected" ] || { echo "the behaviour changed" >&2; exit 1; }
