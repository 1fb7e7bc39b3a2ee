"""A process of test_sharding.py: sharded networks and distributed tensors against plain ones."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fastkd
from fastkd import reference
from fastkd.ops import norm

BATCH = 8


def check_sharded_network(name: str, rank: int, mesh: object) -> None:
    """A step of a network whose parameters are divided over the processes, over images in channels_last."""
    alone = fastkd.models.create_model(name)
    sharded = fastkd.models.create_model(name)
    sharded.load_state_dict(alone.state_dict())
    fully_shard(sharded, mesh=mesh)
    images = torch.randn(BATCH, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    mine = images.chunk(2)[rank]

    def loss(functions, network, images):
        features, logits = network(images, features=True)
        teacher = [x.detach().flip(0) for x in features.stages]
        at = functions.attention_transfer_loss(features.stages, teacher, weight=100.0)
        return (
            at
            + functions.fsp_loss(features.stages, teacher)
            + functions.kd_loss(logits, logits.detach().flip(0))
        )

    loss(fastkd, sharded, mine).backward()
    (sum(loss(reference, alone, part) for part in images.chunk(2)) / 2).backward()
    for (key, ours), exact in zip(sharded.named_parameters(), alone.parameters(), strict=True):
        assert isinstance(ours.grad, DTensor), key
        atol = 1e-4 * max(1e-3, exact.grad.abs().max().item())
        torch.testing.assert_close(
            ours.grad.full_tensor(),
            exact.grad,
            rtol=1e-3,
            atol=atol,
            msg=lambda text: f"{name} {key}: {text}",
        )


def check_distributed_tensors(mesh: object) -> None:
    """The losses of features that are divided over the processes along the batch."""
    shapes = [(BATCH, 3, 4, 4), (BATCH, 4, 4, 4)]
    banks = torch.randn(2, 20, 48).unbind()
    rows = torch.randint(20, (BATCH, 6))

    def beside(x):
        """Banks, which every process has, and the rows of its own samples."""
        if not isinstance(x, DTensor):
            return *banks, rows
        whole = (distribute_tensor(bank, mesh, [Replicate()]) for bank in banks)
        return *whole, distribute_tensor(rows, mesh, [Shard(0)])

    calls = {
        "attention_map": lambda m, s, t: m.attention_map(s[0]).square().sum(),
        "attention_transfer_loss": lambda m, s, t: m.attention_transfer_loss(s, t, weight=10.0),
        "fsp_matrix": lambda m, s, t: m.fsp_matrix(*s).square().sum(),
        "fsp_loss": lambda m, s, t: m.fsp_loss(s, t),
        "kd_loss": lambda m, s, t: m.kd_loss(s[0].flatten(1), t[0].flatten(1)),
        "relu_tap": lambda m, s, t: m.relu_tap(s[0])[1].square().sum(),
        "crd_loss": lambda m, s, t: m.crd_loss(
            s[0].flatten(1), t[0].flatten(1), *beside(s[0]), temperature=9.0
        )[0],
        "rkd_loss": lambda m, s, t: m.rkd_loss(s[0], t[0]),
        # NORM's has no public function, and no backend but these
        "norm_loss": lambda m, s, t: (m if m is reference else norm).norm_loss(s[0], t[0][:, :1], 3),
    }
    by_name = set(calls) - {"kd_loss", "norm_loss"}
    for name, call in calls.items():
        student, teacher = ([torch.randn(shape) for shape in shapes] for _ in range(2))
        divided = [[distribute_tensor(x, mesh, [Shard(0)]) for x in side] for side in (student, teacher)]
        first, plain = divided[0][0].requires_grad_(), student[0].requires_grad_()
        ours, exact = call(fastkd, *divided), call(reference, student, teacher)
        torch.testing.assert_close(ours.full_tensor(), exact, msg=lambda text, name=name: f"{name}: {text}")
        (got,), (want,) = torch.autograd.grad(ours, first), torch.autograd.grad(exact, plain)
        torch.testing.assert_close(got.full_tensor(), want, msg=lambda text, name=name: f"{name}: {text}")
        if name in by_name and fastkd.native.CPU.available:
            try:
                with fastkd.use_backend("cpp"):
                    call(fastkd, *divided)
            except fastkd.BackendError as error:
                assert "serves plain tensors only, the first is a DTensor" in str(error)
            else:
                raise AssertionError(f"{name}: cpp took a DTensor")


def main(store: str, seed: str) -> None:
    rank = int(os.environ["RANK"])
    torch.manual_seed(int(seed))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for name in ("resnet8", "wrn_16_1"):
        check_sharded_network(name, rank, mesh)
    check_distributed_tensors(mesh)
    print(f"rank {rank} agrees")
    dist.destroy_process_group()
