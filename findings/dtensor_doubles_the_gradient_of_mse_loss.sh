#!/usr/bin/env bash
# The gradient of F.mse_loss with its mean is multiplied by the number of processes where the tensors are DTensors.
#
# Two DTensors, sharded over the batch, and loss = F.mse_loss(x, y). The value is right. The gradient of x is twice the
# right one on two processes. F.smooth_l1_loss and F.huber_loss with their means do the same; F.l1_loss does not. The same losses with reduction="sum", or with
# reduction="none" and .mean() after it, are right, and so is (x - y).square().mean(). Nothing is raised or warned of:
# a learning rate is silently multiplied by the number of processes.
#
# Seen with torch 2.13.0 (also 2.14.1) on 2026-11-29, two processes (gloo), gradient divided by that of plain tensors:
#   mse_loss: mean 2, sum 1, none and then mean 1
#   smooth_l1_loss: mean 2, sum 1, none and then mean 1
#   huber_loss: mean 2, sum 1, none and then mean 1
#   l1_loss: mean 1, sum 1, none and then mean 1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
cat > "$folder/seen.py" <<'PYTHON'
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

LOSSES = {"mse_loss": F.mse_loss, "smooth_l1_loss": F.smooth_l1_loss, "huber_loss": F.huber_loss, "l1_loss": F.l1_loss}


def scalar(loss, x, y, reduction):
    found = loss(x, y, reduction=reduction)
    return found.mean() if reduction == "none" else found


def work(rank, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    lines = [f"torch {torch.__version__}, two processes"]
    seen = {}
    for name, loss in LOSSES.items():
        for reduction in ("mean", "sum", "none"):
            plain = x.clone().requires_grad_()
            wanted = scalar(loss, plain, y, reduction)
            wanted.backward()
            sharded = distribute_tensor(x, mesh, [Shard(0)]).requires_grad_()
            found = scalar(loss, sharded, distribute_tensor(y, mesh, [Shard(0)]), reduction)
            assert torch.allclose(found.full_tensor(), wanted), "the value is wrong too"
            found.backward()
            ratio = sharded.grad.full_tensor() / plain.grad
            assert torch.allclose(ratio, ratio[0, 0].expand_as(ratio)), ratio
            seen[name, reduction] = round(ratio[0, 0].item(), 3)
        lines.append("{}: mean {:g}, sum {:g}, none and then mean {:g}".format(name, *[seen[name, r] for r in ("mean", "sum", "none")]))
    dist.destroy_process_group()
    if rank == 0:
        print("\n".join(lines), flush=True)
        doubled = {("mse_loss", "mean"), ("smooth_l1_loss", "mean"), ("huber_loss", "mean")}
        assert seen == {key: 2.0 if key in doubled else 1.0 for key in seen}, "the behaviour changed"


if __name__ == "__main__":
    mp.spawn(work, (sys.argv[1],), nprocs=2)
PYTHON
cd "$folder"
OMP_NUM_THREADS=1 "$folder/venv/bin/python" -W ignore seen.py "$folder/rendezvous"
