#!/usr/bin/env bash
# A copy of a model that set self.forward = torch.compile(self.forward) runs the original's weights.
#
# copy.deepcopy gives a copy parameters of its own, and a bound method among its attributes is bound to the copy. What
# torch.compile makes of a method is a plain function around the original's method. deepcopy takes functions as they
# are, so the copy's parameters are its own but its forward pass is the original's. AveragedModel copies the model that
# way: the averaged weights are right, and every output of the averaged model is the student's. A mean teacher then
# agrees with its student, the distillation loss is 0, and a test of the average is a test of the last weights.
# torch.compile(model) and model.compile() have copies of their own. No C++ compiler is needed.
#
# Seen with torch 2.13.0 on 2026-11-30 (2.14.1 and 2.15.0 give the same), weight 1 and 3, whose average is 2:
#   self.forward = self.forward: weight 2, output 2
#   self.forward = torch.compile(self.forward): weight 2, output 3
#   torch.compile(model): weight 2, output 2
#   model.compile(): weight 2, output 2
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/probe.py" <<'PYTHON'
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.weight * x


def method(model, change):
    model.forward = change(model.forward)
    return model


def compiled(target):
    return torch.compile(target, backend="eager")


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


ways = {
    "self.forward = self.forward": lambda model: method(model, lambda forward: forward),
    "self.forward = torch.compile(self.forward)": lambda model: method(model, compiled),
    "torch.compile(model)": compiled,
    "model.compile()": compiled_in_place,
}
for name, way in ways.items():
    student = way(Student())
    teacher = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    teacher.update_parameters(student)
    with torch.no_grad():
        next(student.parameters()).fill_(3)
        teacher.update_parameters(student)
        weight, output = next(teacher.parameters()).item(), teacher(torch.ones(())).item()
    print(f"{name}: weight {weight:g}, output {output:g}")
PYTHON
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
seen=$(cd "$folder" && venv/bin/python -W ignore probe.py)
echo "$seen"
expected="self.forward = self.forward: weight 2, output 2
self.forward = torch.compile(self.forward): weight 2, output 3
torch.compile(model): weight 2, output 2
model.compile(): weight 2, output 2"
[ "$seen" = "$expected" ] || { echo "the behaviour changed" >&2; exit 1; }
