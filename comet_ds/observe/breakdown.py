# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's ``wall_clock_breakdown`` of a layer: its timers, and the times it publishes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deepspeed.moe import sharded_moe


@contextmanager
def running_timer(timers: Any, name: str) -> Iterator[None]:
    """Run one of DeepSpeed's timers.

    Args:
        timers: the layer's ``SynchronizedWallClockTimer``.
        name: of the timer.
    """
    timers(name).start()
    try:
        yield
    finally:
        timers(name).stop()


def publish_times(layer: Any, *, has_all_to_all: bool) -> None:
    """Set a layer's ``time_*`` attributes to its last forward's times in ms, and reset its timers.

    DeepSpeed's own layer publishes running sums.

    Args:
        layer: a ``MOELayer``.
        has_all_to_all: whether the forward had any.
    """
    layer.time_moe = layer.timers(sharded_moe.MOE_TIMER).elapsed(reset=True)
    if has_all_to_all:
        first, second = sharded_moe.FIRST_ALLTOALL_TIMER, sharded_moe.SECOND_ALLTOALL_TIMER
        layer.time_falltoall = layer.timers(first).elapsed(reset=True)
        layer.time_salltoall = layer.timers(second).elapsed(reset=True)
