"""Several processes that train one student, started by torchrun, srun or mpirun. Each runs the same program.

The first alone looks into the command's folders, writes files and prints. They meet in every step, where
gradients are summed, at an epoch's end, and where the first one has found something that all need
(:func:`from_first`). A process that fails writes why into the group's store and closes its connections.
Whoever waits for it, wherever that is, then raises the same words as a :class:`PeerError`.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fastkd.errors import UserError, one_line
from fastkd.io.console import silenced
from fastkd.training import signals
from fastkd.training.launch import WORLD, Launch, launched, variable

T = TypeVar("T")

FAILURE = "fastkd/failure"
"""The key in the store under which a process that fails writes its error."""

_store: Any = None


class PeerError(UserError):
    """The error of another process, or that it has ended."""


class MeetingError(UserError):
    """This process cannot reach the others, so no other process can report its error."""


def share() -> tuple[int, int]:
    """(which process this is, of how many)."""
    return (
        (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
    )


def leads() -> bool:
    """Whether this process is the first, or alone."""
    return share()[0] == 0


def gpu_index() -> int:
    """Which of the GPUs that PyTorch sees is this process's. Raises UserError if it has none."""
    launch, there = launched(), torch.cuda.device_count()
    if launch is None or (there == 1 and not launch.torchrun):  # srun may show each process its own GPU only
        return 0
    if launch.local >= there:
        which = f"process {launch.local} of this machine, counted from 0,"
        raise UserError(f"{which} has no GPU: PyTorch sees {there}; one process a GPU, or --device cpu")
    return launch.local


@contextmanager
def group(device: str | None) -> Iterator[None]:
    """The processes that were started together know each other inside, where none but the first prints.

    A process that was started alone goes on alone. If one fails, all end: those but the first in silence
    where the user can mend it, since the first one then says what it is. Raises MeetingError.
    """
    launch = launched()
    if launch is None:
        yield
        return
    status = signals.end_late() if launch.rank else None
    cuda = device == "cuda" or (device is None and torch.cuda.is_available())
    try:
        _join(launch, cuda)
    except MeetingError:
        if status is not None and status() != 1:  # a signal ended the first one too, which says so
            sys.exit(status())
        raise
    try:
        with silenced(launch.rank > 0):
            yield
    except BaseException as error:
        _leave(error, cuda)
        if status is not None and isinstance(error, UserError):
            sys.exit(status())
        raise
    dist.destroy_process_group()


def _join(launch: Launch, cuda: bool) -> None:
    global _store
    if not os.environ.get("MASTER_ADDR"):
        if launch.rank:
            sys.exit(2)  # the first one says it
        raise UserError(
            f"{launch.world} processes were started ({variable(WORLD)[0]}), but MASTER_ADDR is not set: start"
            " them with torchrun, or set MASTER_ADDR and MASTER_PORT so that they train together"
        )
    os.environ.setdefault("MASTER_PORT", "29500")  # torchrun's
    if cuda:
        torch.cuda.set_device(gpu_index())
    # Imported once a group is there, its default arguments would hold the group: destroying it would then not
    # end Gloo's threads, and one that frees a tensor while the interpreter ends aborts the process
    # (pytorch/pytorch#190489). Optimizers import it, by torch._dynamo.
    importlib.import_module("torch.distributed.nn")
    from torch.distributed.rendezvous import rendezvous

    try:
        _store = next(rendezvous("env://", launch.rank, launch.world))[0]
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=_store, rank=launch.rank, world_size=launch.world)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} (MASTER_ADDR, MASTER_PORT)"
        raise MeetingError(
            f"{launch.world} processes cannot meet at {where}: {one_line(error)[:200]}"
        ) from None


def _leave(error: BaseException, cuda: bool) -> None:
    """Tells the others what ended this process, and closes its connections."""
    if isinstance(error, Exception) and not isinstance(error, (PeerError, signals.Interrupted)):
        (rank, world), text = share(), one_line(error)[:200]
        if not isinstance(error, UserError):
            text = f"process {rank} of {world} failed with {type(error).__name__}: {text}"
        with suppress(RuntimeError):  # the process that holds the store may be gone
            _store.set(FAILURE, text)
    # NCCL would first wait for sums in which the others take no part; the end of the process closes all
    if not cuda:
        with suppress(RuntimeError):
            dist.destroy_process_group()


@contextmanager
def meeting() -> Iterator[None]:
    """Around what all processes do together. Raises PeerError if one of them has failed or is gone."""
    try:
        yield
    except RuntimeError as error:  # in Gloo's words or NCCL's
        if not isinstance(error, dist.DistError) and "onnection" not in str(error):
            raise
        text = "another process of this run has ended; what was finished is kept"
        with suppress(RuntimeError):
            # the others end in silence, and may have lost the store with the first
            if leads() and _store.check([FAILURE]):
                text = _store.get(FAILURE).decode()
        raise PeerError(text) from None


class _Busy:
    """Sent in place of an answer while the first process is not ready."""


def busy() -> None:
    """Lets the processes that wait in :func:`from_first` go on waiting: without a sign from the first process
    they would give up after half an hour.
    """
    from_first(_Busy)


def from_first(work: Callable[[], T]) -> T:
    """What ``work()`` returns in the first process, given to all; the others do not call it."""
    value: Any = work() if leads() else None
    while share()[1] > 1:
        box = [value]
        with meeting():
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        if leads() or not isinstance(box[0], _Busy):
            return box[0]
    return value
