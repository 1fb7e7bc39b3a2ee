#!/usr/bin/env bash
# FSDP2 (fully_shard) refuses a convolution whose weight is in channels_last.
#
# model.to(memory_format=torch.channels_last) is the usual first step for a convolutional network, and
# DistributedDataParallel takes the result as it is. fully_shard raises NotImplementedError for the same model, for
# every weight with a window larger than 1x1: a 1x1 weight counts as contiguous in both layouts. It does so on one
# process too, where nothing is sharded. Shard first and give the input alone in channels_last, and it works.
#
# Seen with torch 2.13.0 on a CPU (Gloo, one process) on 2026-11-29; 2.14.1 says the same:
#   DistributedDataParallel, 3x3, channels_last: works
#   fully_shard, 3x3, contiguous: works
#   fully_shard, 3x3, channels_last: NotImplementedError
#   fully_shard, 1x1, channels_last: works
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/probe.py" <<'PYTHON'
import os

import torch
import torch.distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

store = "file://" + os.path.abspath("store")
torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
wrappers = {
    "DistributedDataParallel": torch.nn.parallel.DistributedDataParallel,
    "fully_shard": lambda model: fully_shard(model, mesh=mesh),
}
cases = [
    ("DistributedDataParallel", 3, "channels_last"),
    ("fully_shard", 3, "contiguous"),
    ("fully_shard", 3, "channels_last"),
    ("fully_shard", 1, "channels_last"),
]
for wrapper, window, layout in cases:
    layouts = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    model = torch.nn.Conv2d(4, 8, window).to(memory_format=layouts[layout])
    try:
        wrappers[wrapper](model)(torch.ones(1, 4, 5, 5)).sum().backward()
        outcome = "works"
    except NotImplementedError as error:
        outcome = type(error).__name__
    print(f"{wrapper}, {window}x{window}, {layout}: {outcome}")
torch.distributed.destroy_process_group()
PYTHON
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
seen=$(cd "$folder" && venv/bin/python -W ignore probe.py)
echo "$seen"
expected='DistributedDataParallel, 3x3, channels_last: works
fully_shard, 3x3, contiguous: works
fully_shard, 3x3, channels_last: NotImplementedError
fully_shard, 1x1, channels_last: works'
[ "$seen" = "$expected" ] || { echo "the behaviour changed" >&2; exit 1; }
