#!/usr/bin/env bash
# Inductor's C++ wrapper does not compile a custom operator that returns a tensor beside a list of tensors.
#
# An operator of schema "(Tensor x) -> (Tensor, Tensor[])" is legal: it runs in eager mode, and torch.compile takes it
# as it is. With torch._inductor.config.cpp_wrapper = True, which a user sets for less host time, the same graph ends
# with InductorError: "fallback kernels with runtime lookup currently only support tensor returns, not more complicated
# types". An operator that returns the list alone compiles both ways. So a loss that hands out its value and a list of
# gradients has to be two operators, or to return a fixed number of tensors. A C++ compiler is needed.
#
# Seen with torch 2.13.0 (also 2.14.1) on 2026-11-29:
#   a list, usual wrapper: 20
#   a list, C++ wrapper: 20
#   a tensor and a list, usual wrapper: 24
#   a tensor and a list, C++ wrapper: InductorError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
cat > "$folder/seen.py" <<'PYTHON'
import torch
from torch._inductor import config


@torch.library.custom_op("seen::parts", mutates_args=())
def parts(x: torch.Tensor) -> list[torch.Tensor]:
    return [x + 1, x + 2]


@parts.register_fake
def _(x):
    return [torch.empty_like(x), torch.empty_like(x)]


@torch.library.custom_op("seen::sum_and_parts", mutates_args=())
def sum_and_parts(x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    return x.sum(), [x + 1, x + 2]


@sum_and_parts.register_fake
def _(x):
    return x.new_empty(()), [torch.empty_like(x), torch.empty_like(x)]


def a_list(x):
    first, second = torch.ops.seen.parts(x)
    return first.sum() + second.sum()


def a_tensor_and_a_list(x):
    total, (first, second) = torch.ops.seen.sum_and_parts(x)
    return total + first.sum() + second.sum()


print(f"torch {torch.__version__}")
found = {}
for function in (a_list, a_tensor_and_a_list):
    for wrapper in (False, True):
        torch._dynamo.reset()
        config.cpp_wrapper = wrapper
        name = f"{function.__name__.replace('_', ' ')}, {'C++' if wrapper else 'usual'} wrapper"
        try:
            found[name] = f"{torch.compile(function)(torch.ones(4)).item():.0f}"
        except Exception as error:
            found[name] = type(error).__name__
            assert "only support tensor returns" in str(error), error
        print(f"{name}: {found[name]}")
assert list(found.values()) == ["20", "20", "24", "InductorError"], "the behaviour changed"
PYTHON
cd "$folder"
TORCHINDUCTOR_CACHE_DIR="$folder/inductor" "$folder/venv/bin/python" -W ignore seen.py
