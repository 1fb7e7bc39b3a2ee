"""The clocks of a GPU: calls one after the other, or in a CUDA graph."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch


def timed(run: Callable[[], Any], calls: int, warm: bool, device: str) -> float:
    """Seconds a call by the wall clock, up to the end of the device's work."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    if warm:
        run()
    wait()
    begun = time.perf_counter()
    for _ in range(calls):
        run()
    wait()
    return (time.perf_counter() - begun) / calls


class Captured:
    """Calls in a CUDA graph, which is captured when it is first asked for its time."""

    def __init__(self, runs: list[Callable[[], Any]], context: Callable[[], Any]):
        self.runs, self.context = runs, context
        self.graph: torch.cuda.CUDAGraph | None = None

    def _capture(self) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with self.context(), torch.cuda.stream(side):
            for run in (*self.runs[:1] * 3, *self.runs):  # what is compiled or allocated for the first time
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with self.context(), torch.cuda.graph(graph):
            for run in self.runs:
                run()
        return graph

    def turn(self, calls: int, warm: bool, clock: str) -> float:
        """A row's ``turn``, by the device's own clock."""
        if self.graph is None:
            self.graph = self._capture()
        replays = math.ceil(calls / len(self.runs))
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if warm:
            self.graph.replay()
        begin.record()
        for _ in range(replays):
            self.graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / (replays * len(self.runs))
