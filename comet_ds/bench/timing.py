# SPDX-License-Identifier: Apache-2.0
"""Timing on a GPU that is kept busy until the host has enqueued everything."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from deepspeed import comm as dist

from comet_ds._compat.torch import occupy_gpu


class Timer:
    """Events around a piece of work.

    Collective: all ranks start together.

    Args:
        hide_host_ms: time for which the GPU is kept busy first, so that the host enqueues the work
            meanwhile; 0 starts on an idle GPU.
    """

    def __init__(self, hide_host_ms: float = 0.0) -> None:
        dist.barrier()
        torch.cuda.synchronize()
        if hide_host_ms:
            occupy_gpu(int(hide_host_ms * 2e6))  # cycles, at 2 GHz at most
            if dist.get_world_size() > 1:  # devices start together, wherever their hosts are
                dist.all_reduce(torch.ones(1, device="cuda"))
        self._events: list[torch.cuda.Event] = []
        self.mark()

    def mark(self) -> None:
        """Note the time on the device."""
        self._events.append(torch.cuda.Event(enable_timing=True))
        self._events[-1].record()

    def read(self) -> list[float]:
        """Return the ms from the start to every mark; waits for the GPU."""
        torch.cuda.synchronize()
        return [self._events[0].elapsed_time(event) for event in self._events[1:]]


def time_functions(
    functions: dict[str, Callable[[], Any]], num_runs: int, hide_host_ms: float = 2.0
) -> dict[str, float]:
    """Return the median device time of every function in ms, runs interleaved."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for run in range(num_runs + 2):
        for name, function in functions.items():
            timer = Timer(hide_host_ms)
            function()
            timer.mark()
            if run >= 2:
                times[name] += timer.read()
    return {name: statistics.median(t) for name, t in times.items()}


def slowest_rank(times: list[list[float]], device: torch.device) -> list[list[float]]:
    """Return the largest value of all ranks for each time. Collective, through ``device``."""
    largest = torch.tensor(times, dtype=torch.float64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.tolist()
