# SPDX-License-Identifier: Apache-2.0
"""Waiting for the other ranks of an expert parallel group, and naming the one that does not come.

A rank that waits for long writes into the process group's key-value store which wait it is in.
When its time is up it reads what the others have written: who is in the same wait has come. As
long as nobody is late, nothing is written or read.

The device's collectives (NCCL) are waited for by the device. Here only the host waits: for what it
must read, and on the CPU for everything.
"""

from __future__ import annotations

import contextlib
import os
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

# A wait longer than this is written down; another rank that is also there has done so by then.
PATIENCE_S = 1.0
# What a rank that does not come misses, in front of "forward number 3".
FORWARD, BACKWARD = "rows of its", "backward of its"
# The host polls an event without pause for so long, then at these intervals.
POLLING_S, POLL_INTERVAL_S = 0.01, 1e-4


class Attendance:
    """The waits of one layer on this rank; its n-th wait is every rank's n-th.

    Collective in construction: returns when all ranks of the group have come.

    Args:
        group: expert parallel group.
        timeout_s: how long to wait for another rank.

    Attributes:
        num_forwards: forwards begun, see ``begin``.

    Raises:
        RuntimeError: naming a rank that has not come.
    """

    def __init__(self, group: Any, timeout_s: float) -> None:
        self.group, self.timeout_s = group, timeout_s
        self.num_forwards = 0
        self._num_waits = 0
        self._ranks = torch.distributed.get_process_group_ranks(group)
        self._own = torch.distributed.get_rank()
        self._store = torch.distributed.distributed_c10d._get_default_store()
        span = "comet_ds/waits/" + "-".join(map(str, self._ranks))
        layer = self._store.add(f"{span}/layers/{self._own}", 1)
        self._prefix = f"{span}/{layer}"
        self._note(0)
        for rank in self._ranks:
            try:
                self._store.wait([self._key(rank)], timedelta(seconds=timeout_s))
            except torch.distributed.DistError as error:
                raise RuntimeError(self._message(rank, "forward number 1")) from error

    def begin(self) -> int:
        """Return the number of the forward that begins."""
        self.num_forwards += 1
        return self.num_forwards

    def finish(self, work: Any, tensor: Tensor, what: str) -> None:
        """Wait for a collective: on the host for a CPU tensor, else on the current stream.

        Args:
            work: of a collective under way.
            tensor: one that it writes.
            what: rank's part in it, for the message, such as "forward number 3".

        Raises:
            RuntimeError: the collective failed, or a rank did not come in time; named where known.
        """
        if tensor.is_cuda:
            work.wait()
            return
        self._num_waits += 1
        patience_s = min(PATIENCE_S, self.timeout_s / 2)
        start, waited_s = time.monotonic(), 0.0
        while not self._is_done(work, patience_s, what):
            if waited_s == 0:
                self._note(self._num_waits)
            waited_s = time.monotonic() - start
            if waited_s > self.timeout_s:
                self._raise_late(what)

    def finish_event(self, event: torch.cuda.Event, what: str) -> None:
        """Wait on the host for an event behind a collective; else as ``finish``."""
        self._num_waits += 1
        start, is_noted = time.monotonic(), False
        while not event.query():
            waited_s = time.monotonic() - start
            if waited_s > POLLING_S:
                time.sleep(POLL_INTERVAL_S)
            else:
                os.sched_yield()  # a process group's threads may need this core
            if waited_s > min(PATIENCE_S, self.timeout_s / 2) and not is_noted:
                self._note(self._num_waits)
                is_noted = True
            if waited_s > self.timeout_s:
                self._raise_late(what)

    def _is_done(self, work: Any, seconds: float, what: str) -> bool:
        try:
            work.wait(timedelta(seconds=seconds))
        except RuntimeError as error:
            if not work.is_completed():
                return False
            # A rank has ended, or the process group's own time is up.
            self._note(self._num_waits)
            time.sleep(2 * PATIENCE_S)  # others that wait write it down
            absent = self._absent()
            if not absent:
                raise
            raise RuntimeError(f"{self._place(absent[0])} did not come to its {what}") from error
        return True

    def _raise_late(self, what: str) -> None:
        absent = self._absent()
        if absent:
            raise RuntimeError(self._message(absent[0], what))
        raise RuntimeError(
            f"all ranks of the expert parallel group came to their {what}, but it did not end "
            f"within {self.timeout_s:g} s"
        )

    def _absent(self) -> list[int]:
        """Return the ranks that have not written down this wait; empty if nobody knows."""
        try:
            return [rank for rank in self._ranks if self._last_wait(rank) < self._num_waits]
        except torch.distributed.DistError:  # the store's process has ended
            return []

    def _last_wait(self, rank: int) -> int:
        return int(self._store.get(self._key(rank)))

    def _note(self, wait: int) -> None:
        # Where it fails, ``_absent`` does likewise, and the caller's error says what it knows.
        with contextlib.suppress(torch.distributed.DistError):
            self._store.set(self._key(self._own), str(wait))

    def _key(self, rank: int) -> str:
        return f"{self._prefix}/{rank}"

    def _place(self, rank: int) -> str:
        return f"rank {self._ranks.index(rank)} of the expert parallel group"

    def _message(self, rank: int, what: str) -> str:
        return f"{self._place(rank)} did not come to its {what} within {self.timeout_s:g} s"
