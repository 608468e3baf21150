# SPDX-License-Identifier: Apache-2.0
"""Bounded waits for the other ranks of an expert parallel group that name the rank that is late.

All ranks of a group go through the same sequence of waits. A rank that has waited for
``PATIENCE_S`` writes the number of its wait to the process group's key-value store. At the timeout
it reads the numbers of the others: a rank with a smaller number is the late one. The store is not
touched as long as nobody is late.

Only host waits are bounded here: for counts that the host must read, and for all collectives on the
CPU. NCCL collectives are waited for by the device.
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

from comet_ds._compat.torch import default_store

# A longer wait is written to the store, well before the timeout at which other ranks read it.
PATIENCE_S = 1.0
# Parts of a forward that a late rank has missed, for messages: "the backward of its forward ...".
FORWARD, BACKWARD = "the row exchange of", "the backward of"
# The host polls an event without a pause for POLLING_S, then every POLL_INTERVAL_S.
POLLING_S, POLL_INTERVAL_S = 0.01, 1e-4


class Attendance:
    """The waits of one layer on this rank; the n-th wait of one rank is the n-th of all ranks.

    The constructor is collective: it returns when all ranks of the group have entered it.

    Args:
        group: expert parallel group.
        timeout_s: how long to wait for another rank, in seconds.

    Attributes:
        num_forwards: number of forwards begun, see ``begin``.

    Raises:
        RuntimeError: a rank did not enter the constructor in time; names the rank.
    """

    def __init__(self, group: Any, timeout_s: float) -> None:
        self.group, self.timeout_s = group, timeout_s
        self.num_forwards = 0
        self._num_waits = 0
        self._ranks = torch.distributed.get_process_group_ranks(group)
        self._own = torch.distributed.get_rank()
        self._store = default_store()
        span = "comet_ds/waits/" + "-".join(map(str, self._ranks))
        layer = self._store.add(f"{span}/layers/{self._own}", 1)
        self._prefix = f"{span}/{layer}"
        self._note(0)
        for rank in self._ranks:
            try:
                self._store.wait([self._key(rank)], timedelta(seconds=timeout_s))
            except torch.distributed.DistError as error:
                raise RuntimeError(self._message(rank, "its forward number 1")) from error

    def begin(self) -> int:
        """Count a forward; return its number, from 1."""
        self.num_forwards += 1
        return self.num_forwards

    def finish(self, work: Any, tensor: Tensor, what: str) -> None:
        """Wait for a collective: on the host for a CPU tensor, else on the current stream.

        Args:
            work: handle of the collective.
            tensor: a tensor that the collective writes.
            what: name of the wait in messages, such as "its forward number 3".

        Raises:
            RuntimeError: the collective failed, or a rank did not join it in time; the message
                names the rank if it is known.
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
        """Wait on the host for an event that was recorded after a collective.

        Args:
            event: recorded on the current stream.
            what: name of the wait in messages.

        Raises:
            RuntimeError: a rank did not join the collective in time; the message names the rank if
                it is known.
        """
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
            # A process has ended, or the process group's own timeout has passed.
            self._note(self._num_waits)
            time.sleep(2 * PATIENCE_S)  # until the other waiting ranks have written their number
            late = self._late_ranks()
            if not late:
                raise
            raise RuntimeError(f"{self._describe(late[0])} did not reach {what}") from error
        return True

    def _raise_late(self, what: str) -> None:
        late = self._late_ranks()
        if late:
            raise RuntimeError(self._message(late[0], what))
        raise RuntimeError(
            f"all ranks of the expert parallel group reached {what}, but it did not finish "
            f"within {self.timeout_s:g} s"
        )

    def _late_ranks(self) -> list[int]:
        """Return the ranks that have not written this wait; empty if the store cannot be read."""
        try:
            return [rank for rank in self._ranks if self._last_wait(rank) < self._num_waits]
        except torch.distributed.DistError:  # the store's process has ended
            return []

    def _last_wait(self, rank: int) -> int:
        return int(self._store.get(self._key(rank)))

    def _note(self, wait: int) -> None:
        # If the store cannot be reached, ``_late_ranks`` cannot either and names no rank.
        with contextlib.suppress(torch.distributed.DistError):
            self._store.set(self._key(self._own), str(wait))

    def _key(self, rank: int) -> str:
        return f"{self._prefix}/{rank}"

    def _describe(self, rank: int) -> str:
        return f"rank {self._ranks.index(rank)} of the expert parallel group"

    def _message(self, rank: int, what: str) -> str:
        return f"{self._describe(rank)} did not reach {what} within {self.timeout_s:g} s"
