"""FSDP2's ``fully_shard`` around the networks, and the losses of DTensors, in two gloo processes."""

from __future__ import annotations

import torch
from child_process import ranks


def test_networks_and_losses_agree_when_sharded(tmp_path):
    done = ranks(2, "sharding_worker", tmp_path / "store", torch.randint(2**31, ()).item())
    assert done.returncode == 0 and done.stdout.count("agrees") == 2, done.stdout + done.stderr
