"""How this process was started: alone, or one of several by torchrun, srun or mpirun (the environment)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

from fastkd.errors import UserError

# The variables in which launchers write a process's number, the number of all processes, and its number on
# this machine. The first of each is torchrun's and that of PyTorch's "env://". SLURM_NTASKS does not mean
# several processes: a batch script has it too when its command is started once, without srun.
RANK = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
WORLD = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
LOCAL = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")


class Launch(NamedTuple):
    """What the environment says of processes that were started together.

    ``rank`` and ``local``: this process's number among all ``world``, and on its machine, of ``nodes``.
    """

    rank: int
    world: int
    local: int
    nodes: int
    torchrun: bool


def launched() -> Launch | None:
    """None for a process that was started alone. Raises UserError for contradictory variables."""
    torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    (world_name, world), (rank_name, rank) = variable(WORLD), variable(RANK)
    if world is None and os.environ.get("RANK") and os.environ.get("MASTER_ADDR"):
        raise UserError(f"RANK is {rank}, but WORLD_SIZE is not set: start the processes with torchrun")
    if world is None or (world == 1 and not torchrun):
        return None
    if rank is None:
        raise UserError(
            f"{world_name} is {world}, but {RANK[0]} is not set: start the processes with torchrun"
        )
    if not 0 <= rank < world:
        raise UserError(f"{rank_name} is {rank}, wanted 0 to {world - 1}, since {world_name} is {world}")
    local = variable(LOCAL)[1]
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", 1)) if torchrun else 1
    return Launch(rank, world, rank if local is None else local, nodes, torchrun)


def variable(names: Sequence[str]) -> tuple[str, int | None]:
    name = next((name for name in names if os.environ.get(name)), names[0])
    try:
        return name, int(os.environ[name]) if os.environ.get(name) else None
    except ValueError:
        raise UserError(f"{name} is {os.environ[name]!r}, wanted a number") from None


def is_first() -> bool:
    """Whether this process says what happens to the command: it is alone, or the first of several."""
    try:
        launch = launched()
    except UserError:  # which each of them has to say
        return True
    return launch is None or launch.rank == 0
