"""FSDP2's ``fully_shard`` around the networks, and the losses of DTensors, in two gloo processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch


def test_networks_and_losses_agree_when_sharded(tmp_path):
    script, seed = (
        str(Path(__file__).parents[1] / "helpers" / "sharding_worker.py"),
        str(torch.randint(2**31, ()).item()),
    )
    command = [sys.executable, script, str(tmp_path / "store")]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), seed], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(2)
    ]
    try:
        for process in ranks:
            out, _ = process.communicate(timeout=240)
            assert process.returncode == 0 and "agrees" in out, out
    finally:
        for process in ranks:
            process.kill()
