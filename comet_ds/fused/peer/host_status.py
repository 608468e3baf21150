# SPDX-License-Identifier: Apache-2.0
"""What every rank of a host says of its next forward, through shared memory."""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed
from deepspeed import comm as dist

from comet_ds.ranks.gradients import NUM_NEED_BITS
from comet_ds.ranks.waiting import POLL_INTERVAL_S, POLLING_S


class RankStatus(NamedTuple):
    """What a rank says of its next forward.

    Attributes:
        num_tokens: T of the rank; 0 with a fault.
        can_fuse: whether its input and experts can take the fused path.
        fault: code and value of the rule its input breaks, ``(InputRules.OK, 0)`` if none.
        needs: gradients it needs, from ``find_needs``.
    """

    num_tokens: int
    can_fuse: bool
    fault: tuple[int, int]
    needs: int = 0


class HostStatusExchange:
    """Every rank's ``RankStatus`` on every rank of a host, through a page of shared memory.

    Words are written whole and carry the number of the call, so their order does not matter. There
    are two of each: a rank writes a call's when all have written, and so read, the one before.

    Args:
        group: process group, all of one host; all its ranks construct one.
        timeout_s: how long to wait for another rank.

    Raises:
        RuntimeError: on all ranks, if one cannot open the page.
    """

    WORDS, NUMBER_BITS = 2, 15
    PAYLOAD_BITS = 63 - NUMBER_BITS

    def __init__(self, group: Any, timeout_s: float) -> None:
        self.rank, self.num_ranks = dist.get_rank(group=group), dist.get_world_size(group=group)
        self.timeout_s, self._number = timeout_s, 0
        self._found: list[tuple[int, int]] = []  # what the ranks said last, and what it means
        self._statuses: list[RankStatus] = []
        # Memory without a name, of which killed ranks leave nothing; a file where processes may not
        # open each other's.
        for has_name in (False, True):
            faults = self._share_page(group, has_name)
            if not faults:
                return
        raise RuntimeError(faults[0])

    def _share_page(self, group: Any, has_name: bool) -> list[str]:
        """Map a page that all ranks have; return why some could not, nothing if all could."""
        path: list[str | None] = [None]
        page, error = None, None
        if self.rank == 0:
            try:
                page, path[0] = self._make_page(has_name)
            except OSError as found:
                error = found
        torch.distributed.broadcast_object_list(path, group=group, group_src=0)
        try:
            if path[0] is not None:
                with open(path[0], "r+b") as file:
                    self._words = memoryview(mmap.mmap(file.fileno(), mmap.PAGESIZE)).cast("q")
        except OSError as found:
            error = found
        fault = None
        if error is not None:
            fault = f"rank {dist.get_rank()} cannot share memory with the others: {error}"
        answers: list[Any] = [None] * self.num_ranks
        torch.distributed.all_gather_object(answers, (os.getpid(), fault), group=group)
        if page is not None:  # all have it open, or have given up
            os.close(page)
            if has_name and path[0] is not None:
                os.unlink(path[0])
        self._processes = [process for process, _ in answers]
        return [fault for _, fault in answers if fault is not None]

    @staticmethod
    def _make_page(has_name: bool) -> tuple[int, str]:
        """Return the descriptor of a new page, and by which path other processes open it."""
        if has_name:
            shared = "/dev/shm" if os.path.isdir("/dev/shm") else None
            page, path = tempfile.mkstemp(prefix="comet_ds_", dir=shared)
        else:
            page = os.memfd_create("comet_ds")
            path = f"/proc/{os.getpid()}/fd/{page}"
        os.ftruncate(page, mmap.PAGESIZE)
        return page, path

    def exchange(self, mine: RankStatus) -> list[RankStatus]:
        """Return what all ranks say of the same forward, by rank.

        The list is the same object as long as no rank says anything else.

        Raises:
            RuntimeError: a rank did not come in time, or its process has ended.
        """
        self._number += 1
        code, value = mine.fault
        flags = mine.can_fuse | mine.needs << 1 | code << 1 + NUM_NEED_BITS
        payloads = (mine.num_tokens | flags << 32, value + 1)
        first = self._first_word(self.rank)
        for i, payload in enumerate(payloads):
            self._words[first + i] = self._tag() << self.PAYLOAD_BITS | payload
        found = [self._read(rank) for rank in range(self.num_ranks)]
        if found != self._found:
            self._found, self._statuses = found, [self._parse(*payloads) for payloads in found]
        return self._statuses

    def _read(self, rank: int) -> tuple[int, int]:
        first, tag, mask = self._first_word(rank), self._tag(), (1 << self.PAYLOAD_BITS) - 1
        start, waited_s, polls = time.monotonic(), 0.0, 0
        while True:
            one, two = self._words[first], self._words[first + 1]
            if one >> self.PAYLOAD_BITS == tag == two >> self.PAYLOAD_BITS:
                return one & mask, two & mask
            polls += 1
            if waited_s > POLLING_S:  # the core may have better things to do
                time.sleep(POLL_INTERVAL_S)
            elif polls % 64:
                continue
            else:
                os.sched_yield()  # the other may be waiting for this core
            waited_s = time.monotonic() - start
            self._check(rank, waited_s)

    @staticmethod
    def _parse(payload: int, value: int) -> RankStatus:
        flags, needs_mask = payload >> 32, (1 << NUM_NEED_BITS) - 1
        fault = (flags >> 1 + NUM_NEED_BITS, value - 1)
        return RankStatus(payload & 0xFFFFFFFF, bool(flags & 1), fault, flags >> 1 & needs_mask)

    def _check(self, rank: int, waited_s: float) -> None:
        where = f"rank {rank} of the expert parallel group"
        if _has_ended(self._processes[rank]):
            raise RuntimeError(f"{where}: its process has ended")
        if waited_s > self.timeout_s:
            raise RuntimeError(
                f"{where} did not reach its forward number {self._number} within "
                f"{self.timeout_s:g} s"
            )

    def _tag(self) -> int:
        return self._number % (1 << self.NUMBER_BITS - 1) + 1  # never 0, what a new page holds

    def _first_word(self, rank: int) -> int:
        return (self._number % 2 * self.num_ranks + rank) * self.WORDS


def _has_ended(process: int) -> bool:
    """Whether a process of this host has ended, also where nobody has asked for its status yet."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return True
    return status.rpartition(")")[2].split()[0] in "ZX"
