#!/usr/bin/env bash
# F.cosine_embedding_loss of DTensors that are sharded over features is too large by the number of processes less one.
#
# The loss of a pair that belongs together is 1 - cosine. Sharded over features, each process has a part of the cosine,
# still to be summed. The loss makes the 1 by filling a tensor like it; each process fills its part with the whole 1,
# and the sum has as many as there are processes. Two equal tensors have the loss 1 on two processes instead of 0. The
# gradient is right, so training goes on and only the logged loss, and whatever weighs or stops by it, is wrong. Sharded
# over the batch it is right, and so are 1 - F.cosine_similarity(x, y) and torch.ones_like: only fill_, which cosine
# embedding loss uses, takes each part for the whole. Nothing is raised or warned of.
#
# Seen with torch 2.13.0 (also 2.14.1 and 2.15.0) on 2026-11-30, two processes (gloo), of two equal tensors:
#   sharded over the batch: cosine_embedding_loss 0, gradient right, 1 - cosine_similarity 0
#   sharded over features: cosine_embedding_loss 1, gradient right, 1 - cosine_similarity 0
#   a sum over the sharded dimension, filled with 1: 2
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


def work(rank, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    x, y = torch.randn(4, 6), torch.randn(4, 6)
    plain = x.clone().requires_grad_()
    F.cosine_embedding_loss(plain, y, torch.ones(4)).backward()
    lines = []
    for name, dim in (("the batch", 0), ("features", 1)):
        same, other = distribute_tensor(x, mesh, [Shard(dim)]), distribute_tensor(y, mesh, [Shard(dim)])
        loss = F.cosine_embedding_loss(same, same, torch.ones_like(same[:, 0])).full_tensor().item()
        right = (1 - F.cosine_similarity(same, same)).mean().full_tensor().item()
        student = same.clone().detach().requires_grad_()
        F.cosine_embedding_loss(student, other, torch.ones_like(other[:, 0])).backward()
        gradient = "right" if torch.allclose(student.grad.full_tensor(), plain.grad, atol=1e-6) else "wrong"
        lines.append(
            f"sharded over {name}: cosine_embedding_loss {abs(loss):.0f}, gradient {gradient}, "
            f"1 - cosine_similarity {abs(right):.0f}"
        )
    filled = distribute_tensor(x, mesh, [Shard(1)]).sum(1).fill_(1).full_tensor()
    lines.append(f"a sum over the sharded dimension, filled with 1: {filled[0].item():.0f}")
    dist.destroy_process_group()
    if rank == 0:
        print("\n".join(lines), flush=True)


if __name__ == "__main__":
    mp.spawn(work, (sys.argv[1],), nprocs=2)
PYTHON
cd "$folder"
seen=$(OMP_NUM_THREADS=1 "$folder/venv/bin/python" -W ignore seen.py "$folder/rendezvous")
echo "$seen"
expected="sharded over the batch: cosine_embedding_loss 0, gradient right, 1 - cosine_similarity 0
sharded over features: cosine_embedding_loss 1, gradient right, 1 - cosine_similarity 0
a sum over the sharded dimension, filled with 1: 2"
[ "$seen" = "$expected" ] || { echo "the behaviour changed" >&2; exit 1; }
