"""Several processes that train one student, started by torchrun, srun or mpirun: the first leads, the others follow its orders.

The first one alone looks into the command's folders, writes files and prints. They meet in every step, where gradients are summed, and
at an epoch's end. Before each of these sums they exchange whether one of them has failed (:func:`synchronize`),
since the others would wait for its part until the group's timeout.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastkd.training.errors import UserError

T = TypeVar("T")


def share() -> tuple[int, int]:
    """(which process this is, of how many)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def leads() -> bool:
    return share()[0] == 0


# Where launchers write a process's number, the number of all, and its number on this machine. The first of each
# is torchrun's, and of everybody who prepares PyTorch's "env://". SLURM_NTASKS is no sign of several processes:
# a batch script has it too, whose command was started once and by no srun.
_RANK = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
_WORLD = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_LOCAL = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")


class Launch(NamedTuple):
    """What the environment says of processes that were started together: of this one, and how many there are on how many machines."""

    rank: int
    world: int
    local: int
    nodes: int
    torchrun: bool


def launched() -> Launch | None:
    """None for a process that was started alone. Raises UserError for variables that contradict each other."""
    torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    (world_name, world), (rank_name, rank) = _variable(_WORLD), _variable(_RANK)
    if world is None and os.environ.get("RANK") and os.environ.get("MASTER_ADDR"):
        raise UserError(f"RANK is {rank}, but WORLD_SIZE is not set: start the processes with torchrun")
    if world is None or (world == 1 and not torchrun):
        return None
    if rank is None:
        raise UserError(f"{world_name} is {world}, but {_RANK[0]} is not set: start the processes with torchrun")
    if not 0 <= rank < world:
        raise UserError(f"{rank_name} is {rank}, wanted 0 to {world - 1}, since {world_name} is {world}")
    local = _variable(_LOCAL)[1]
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", 1)) if torchrun else 1
    return Launch(rank, world, rank if local is None else local, nodes, torchrun)


def _variable(names: Sequence[str]) -> tuple[str, int | None]:
    name = next((name for name in names if os.environ.get(name)), names[0])
    try:
        return name, int(os.environ[name]) if os.environ.get(name) else None
    except ValueError:
        raise UserError(f"{name} is {os.environ[name]!r}, wanted a number") from None


def gpu_index() -> int:
    """Which of the GPUs that PyTorch sees here is this process's. Raises UserError if it has none of its own."""
    launch, there = launched(), torch.cuda.device_count()
    if launch is None or (there == 1 and not launch.torchrun):  # srun may show each process its own GPU only
        return 0
    if launch.local >= there:
        which = f"process {launch.local} of this machine, counted from 0,"
        raise UserError(f"{which} has no GPU: PyTorch sees {there}; one process a GPU, or --device cpu")
    return launch.local


@contextmanager
def group(device: str | None) -> Iterator[None]:
    """The processes that were started together know each other inside. A process that was started alone goes on alone."""
    launch = launched()
    if launch is None:
        yield
        return
    if not os.environ.get("MASTER_ADDR"):
        if launch.rank:
            sys.exit(2)  # the first one says it
        raise UserError(
            f"{launch.world} processes were started ({_variable(_WORLD)[0]}), but MASTER_ADDR is not set: start them with torchrun, "
            "or set MASTER_ADDR and MASTER_PORT so that they train together"
        )
    os.environ.setdefault("MASTER_PORT", "29500")  # torchrun's
    cuda = device == "cuda" or (device is None and torch.cuda.is_available())
    if cuda:
        torch.cuda.set_device(gpu_index())
    # Imported once a group is there, its default arguments would hold the group: destroying it would then not end Gloo's threads, and one
    # that frees a tensor while the interpreter ends aborts the process (pytorch/pytorch#190489). Optimizers import it, by torch._dynamo.
    importlib.import_module("torch.distributed.nn")
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", rank=launch.rank, world_size=launch.world)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} (MASTER_ADDR, MASTER_PORT)"
        raise UserError(f"{launch.world} processes cannot meet at {where}: {' '.join(str(error).split())[:200]}") from None
    yield
    dist.destroy_process_group()  # not after an error: the others may wait for something else


def order(what: Any) -> None:
    """Something for those who wait in :func:`receive`. None ends them."""
    if share()[1] > 1:
        dist.broadcast_object_list([what], src=0)


def receive() -> Any:
    """What the first process ordered."""
    box = [None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def leading(work: Callable[[], T]) -> T:
    """``work()`` of the process that leads; its end, or its UserError, ends the others. Raises UserError when one of them is gone."""
    try:
        done = work()
    except UserError:
        with suppress(RuntimeError):  # one of them may be gone
            order(None)
        raise
    except RuntimeError as error:
        if not lost(error):
            raise
        raise UserError("another process of this run has ended; what was finished is kept") from None
    order(None)
    return done


def lost(error: BaseException) -> bool:
    """Whether another process is gone, in Gloo's words or NCCL's."""
    return share()[1] > 1 and (isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "onnection" in str(error)))


class PeerError(UserError):
    """What another process failed with."""


def synchronize(flags: Sequence[bool] = (), error: Exception | None = None) -> list[bool]:
    """Waits for all processes, and returns for each flag whether it is set in any of them: all give the same number of flags.

    A process that has failed gives its ``error``; the others then raise it as a PeerError. Nothing here waits for a GPU.
    """
    rank, world = share()
    if world == 1:
        return list(flags)
    sent = torch.tensor([0 if error is None else world - rank, *flags], dtype=torch.int32)
    dist.all_reduce(sent, dist.ReduceOp.MAX)
    if not sent[0]:
        return [bool(flag) for flag in sent[1:].tolist()]
    failed, text = world - int(sent[0]), " ".join(str(error).split())[:200]
    if not isinstance(error, UserError):
        text = f"process {rank} of {world} failed with {type(error).__name__}: {text}"
    words: list[Any] = [text]
    dist.broadcast_object_list(words, src=failed, device=torch.device("cpu"))
    if error is not None:
        return list(flags)  # it has its own to raise
    raise PeerError(words[0])


def together(work: Callable[[], T], flags: int = 0) -> T:
    """``work()``, done by all processes at once: if it fails in one, the others raise PeerError where they next
    :func:`synchronize`, at its end at the latest. ``flags``: how many are exchanged within ``work``.
    """
    try:
        done = work()
    except PeerError:
        raise
    except Exception as error:
        if not lost(error):
            with suppress(RuntimeError):  # another may be gone, which is not what to report
                synchronize([False] * flags, error)
        raise
    synchronize([False] * flags)
    return done


def add_gradients(parameters: Sequence[nn.Parameter], weight: float) -> None:
    """Gradients become the sums over all processes of ``weight`` times their own: with its share of the images, the mean's gradients.

    Where no process has a gradient there is none afterwards, since the optimizer decays a parameter whose gradient
    is zero, and leaves one without a gradient alone.
    """
    if share()[1] == 1:
        return
    there = synchronize([parameter.grad is not None for parameter in parameters])
    grads = []
    for parameter in (parameter for parameter, needed in zip(parameters, there, strict=True) if needed):
        if parameter.grad is None:  # no image here, but everybody sends the same numbers of bytes
            parameter.grad = torch.zeros_like(parameter)
        grads.append(parameter.grad)
    if not grads:
        return
    flat = torch.cat([grad.reshape(-1) for grad in grads]).mul_(weight)
    dist.all_reduce(flat)
    for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view(grad.shape))


def add(values: Tensor) -> Tensor:
    """The sum of everybody's, in place."""
    if share()[1] > 1:
        dist.all_reduce(values)
    return values


def joined_rows(tree: T, rows: int) -> T:
    """Each tensor of ``tree``, whose rows belong to this process's images, with the rows of all processes, ``rows`` in all."""
    rank, world = share()
    if world == 1:
        return tree
    sizes = [len(part) for part in torch.empty(rows).tensor_split(world)]  # as Batches.draw divides them

    def join(mine: Tensor) -> Tensor:
        parts = [mine.new_zeros(sizes[0], *mine.shape[1:]) for _ in sizes]  # the first part is a largest one
        parts[rank][: len(mine)] = mine
        dist.all_gather(parts, parts[rank].clone())
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    return torch.utils._pytree.tree_map(join, tree)


def same_buffers(*modules: nn.Module | None) -> None:
    """Everybody's buffers become those of the first process: running averages are of each one's own images until here."""
    if share()[1] > 1:
        for module in modules:
            for buffer in module.buffers() if module is not None else ():
                dist.broadcast(buffer, src=0)
