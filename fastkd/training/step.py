"""One training step, as a function of the numbers drawn for its batch: eager, compiled or a CUDA graph."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.data.loader import AnyBatches
from fastkd.distillation import Distillation
from fastkd.errors import UserError, one_line
from fastkd.methods import Output
from fastkd.methods.sum import Losses
from fastkd.training import collectives
from fastkd.training.progress import Progress


class Shared(NamedTuple):
    """A batch for several students: what was ``drawn``, its ``inputs``, and the teacher's answer, if any."""

    drawn: Any
    inputs: tuple[Tensor, ...]
    taught: Output | None


def after_each(steps: Iterator[Any]) -> Iterator[None]:
    """``Trainer.train_steps``, which stops before each step, as an iterator that stops after each step."""
    next(steps)
    for _ in itertools.chain(steps, [None]):
        yield


class TrainStep:
    """A training step: images, both networks, losses, gradients, optimizer. ``sums``, over the images of the
    epoch so far: each term of the loss, then the number of correct predictions.

    ``compiled``: networks and losses as one compiled function, for whole batches; what is left of an epoch
    runs eagerly rather than being compiled too. ``captured``: all of it as a CUDA graph. Nothing here waits
    for the device.
    """

    def __init__(
        self,
        distillation: Distillation,
        optimizer: torch.optim.SGD,
        batches: AnyBatches,
        compiled: bool,
        captured: bool,
    ):
        self.distillation, self.optimizer = distillation, optimizer
        self.batches, self.compiled = batches, compiled
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        # on the device, and read about once a second
        self.sums = torch.zeros(len(distillation.names) + 1, device=batches.device, dtype=torch.float64)
        self.forward: Callable[..., Losses] = distillation
        if compiled:
            self.forward = torch.compile(distillation, dynamic=False, fullgraph=True)
        self.graph = Replayed(self._whole) if captured else None
        self.rate: Tensor | None = None
        if captured:  # a graph would keep a number for ever
            self.rate = torch.zeros((), device=batches.device)
        self.compiling = 0.0  # seconds, once

    def __call__(
        self, augment_params: Tensor, images: int, progress: Progress, shared: Shared | None = None
    ) -> None:
        """A step on one of ``Batches.draw``, this process's part of a batch of so many ``images``; ``shared``
        is what was made of it for several students, whose steps are all eager.
        """
        if shared is not None or len(augment_params) < self.batches.batch_size:
            self._run(augment_params, images, self.distillation, shared)
        elif self.compiled and not self.compiling:
            self._compile(augment_params, images, progress)
        elif self.graph is not None:
            self.graph(augment_params)
        else:
            self._whole(augment_params)

    def set_rate(self, rate: float) -> None:
        if self.rate is not None:
            self.rate.fill_(rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate if self.rate is None else self.rate

    def reset_momentum(self) -> None:
        """Sets all momenta to zero, in place, as in a new optimizer."""
        for state in self.optimizer.state.values():
            if state.get("momentum_buffer") is not None:
                state["momentum_buffer"].zero_()

    def _whole(self, augment_params: Tensor) -> None:
        self._run(augment_params, self.batches.joined, self.forward)

    def _run(
        self,
        augment_params: Tensor,
        together: int,
        forward: Callable[..., Losses],
        shared: Shared | None = None,
    ) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        inputs = self.batches.inputs(augment_params) if shared is None else shared.inputs
        images, labels, index, *teachers = inputs
        records: dict[str, Any] = {}
        if len(augment_params):  # a small batch may have no part for everybody
            if shared is None:
                losses = forward(images, labels, index, *teachers)
            else:
                losses = forward(images, labels, index, taught=shared.taught)
            losses.total.backward()
            records = losses.records
            right = (losses.student_logits.detach().argmax(1) == labels).sum()
            terms = torch.stack(list(losses.terms.values())).detach()
            self.sums += torch.cat([terms * len(labels), right.float()[None]])
        collectives.add_gradients(self.parameters, len(augment_params) / together)
        self.optimizer.step()
        if records:
            self.distillation.update(*collectives.joined_rows((index, records), together))

    def _compile(self, augment_params: Tensor, images: int, progress: Progress) -> None:
        """The first whole batch, whose step waits for the compiler."""
        progress.line(
            "compiling the step: about half a minute, or some for a deep network; --no-compile does without"
        )
        begun = time.perf_counter()
        # a CUDA build without a GPU warns of that
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        try:
            self._run(augment_params, images, self.forward)
        except Exception as error:
            cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or "that of torch.compile"  # which sets it
            foreign = not type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
            if foreign and not any(
                name in f"{error} {getattr(error, 'filename', '')}" for name in (cache, "torch._inductor")
            ):
                raise
            cause = getattr(error, "inner_exception", error)
            text = f"{type(cause).__name__}: {one_line(cause)[:200]}"
            # what the compiler itself refuses is an error of its own; any other comes from a file that it
            # wrote before
            damaged = f"; a damaged cache is cleared by deleting {cache}" * (
                not type(cause).__module__.startswith("torch.")
            )
            raise UserError(
                f"the step cannot be compiled ({text}): --no-compile does without{damaged}"
            ) from None
        self.compiling = time.perf_counter() - begun
        progress.wait(self.compiling)
        progress.line(f"compiled in {self.compiling:.0f} s")


class Replayed:
    """``run(augment_params)`` as a CUDA graph: the first calls run it as it is, on a stream of their own,
    then it is captured once.

    They are steps like the others; libraries, compilers and the optimizer then make what they keep.
    """

    FIRST = 3

    def __init__(self, run: Callable[[Tensor], None]):
        self.run, self.calls = run, 0
        self.graph: Any = None

    def __call__(self, augment_params: Tensor) -> None:
        self.calls += 1
        if self.calls <= self.FIRST:
            self.warm(augment_params)
            return
        if self.graph is None:
            self.augment_params = augment_params.clone()  # where every replay looks
            self.graph = self.capture()
        self.augment_params.copy_(augment_params)
        self.graph.replay()

    def warm(self, augment_params: Tensor) -> None:
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            self.run(augment_params)
        current.wait_stream(stream)

    def capture(self) -> Any:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run(self.augment_params)
        return graph
