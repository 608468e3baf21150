# SPDX-License-Identifier: Apache-2.0
"""What ranks tell each other before they exchange rows.

Configuration once; every forward counts, or on the fused path the number of tokens.

A rank that cannot go on says so in the message its peers wait for anyway, so every rank raises the
same error and none is left in a collective.
"""

from __future__ import annotations

import json
import mmap
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from deepspeed import comm as dist
from deepspeed.constants import default_pg_timeout
from torch import Tensor

from comet_ds.gradients import NUM_NEED_BITS, BackwardNeeds
from comet_ds.waiting import POLL_INTERVAL_S, POLLING_S, Attendance

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def agree_on_setup(
    facts: Mapping[str, Any], ranks: range, *, timeout: timedelta = default_pg_timeout
) -> None:
    """Check that a range of ranks is set up alike.

    Goes through the process group's key-value store, not through a collective: ranks that disagree
    would not issue the same collectives.

    Args:
        facts: JSON values that must be equal on all ranks, by name.
        ranks: global ranks taking part, this one included. The n-th call of each for this range
            is compared with the n-th call of the others.
        timeout: how long to wait for the others.

    Raises:
        ValueError: on every rank, naming the first fact that differs and both values, or the rank
            that did not come.
    """
    rank, first = dist.get_rank(), ranks.start
    store = torch.distributed.distributed_c10d._get_default_store()
    span = f"comet_ds/{ranks.start}-{ranks.stop}"
    ordinal = store.add(f"{span}/calls/{rank}", 1)
    key = f"{span}/{ordinal}"
    store.set(f"{key}/{rank}", json.dumps(dict(facts)))
    if rank == first:
        store.set(f"{key}/verdict", _compare(store, key, facts, ranks, timeout))
    else:
        try:
            store.wait([f"{key}/verdict"], 2 * timeout)
        except torch.distributed.DistError as error:
            raise ValueError(f"rank {first} did not reach set-up {ordinal}") from error
    verdict = store.get(f"{key}/verdict").decode()
    if verdict:
        raise ValueError(f"set-up {ordinal}: {verdict}")


def _compare(
    store: Any, key: str, facts: Mapping[str, Any], ranks: range, timeout: timedelta
) -> str:
    """Return what is wrong, or an empty string."""
    mine = json.loads(json.dumps(dict(facts)))
    for rank in ranks:
        try:
            store.wait([f"{key}/{rank}"], timeout)
        except torch.distributed.DistError:
            return f"rank {rank} did not take part within {timeout}"
        theirs = json.loads(store.get(f"{key}/{rank}"))
        for name, value in mine.items():
            if theirs.get(name) != value:
                return (
                    f"{name} must be the same on all ranks, got {value} on rank {ranks.start} "
                    f"and {theirs.get(name)} on rank {rank}"
                )
    return ""


def agree_on_largest(value: int, group: Any, device: torch.device) -> int:
    """Return the largest of all ranks' values. Collective; waits for the device."""
    message = torch.tensor([value], device=device)
    dist.all_reduce(message, op=dist.ReduceOp.MAX, group=group)
    return int(message)


@dataclass(frozen=True)
class InputRules:
    """What a layer's input must be.

    A broken rule is a fault: its code and what was given, two integers that fit in the message
    every rank waits for anyway.

    Attributes:
        hidden: size of the last dimension.
        dtype: the experts' dtype; None where they decide (mixed parameters, autocast, a module that
            converts what it is given). Ranks bring the same.
        device: the layer's.
        takes_used_token: whether ``used_token`` is looked at.
    """

    hidden: int
    dtype: torch.dtype | None
    device: torch.device
    takes_used_token: bool

    OK, HIDDEN, DTYPE, DEVICE, USED_TOKEN = range(5)

    def check(self, x: Tensor, used_token: Tensor | None) -> tuple[int, int]:
        """Return code and value of the first rule broken, ``(OK, 0)`` if none is."""
        if x.shape[-1:] != (self.hidden,):
            return self.HIDDEN, x.shape[-1] if x.dim() else 0
        if x.device != self.device:
            return self.DEVICE, 0
        if x.dtype not in DTYPES or (self.dtype is not None and x.dtype != self.dtype):
            return self.DTYPE, DTYPES.index(x.dtype) if x.dtype in DTYPES else -1
        if self.takes_used_token and used_token is not None:
            fits = used_token.numel() * self.hidden == x.numel()
            if not fits or used_token.device != self.device:
                return self.USED_TOKEN, used_token.numel()
        return self.OK, 0

    def raise_first(self, faults: Sequence[Sequence[int]]) -> None:
        """Raise ValueError for the first fault, if any; faults by rank of the EP group."""
        for rank, (code, value) in enumerate(faults):
            if code != self.OK:
                where = f"rank {rank} of the expert parallel group"
                raise ValueError(f"{where}: {self.message(code, value)}")

    def raise_if_they_differ(self, said: Sequence[int]) -> None:
        """Raise ValueError where ranks bring different dtypes; ``dtype_code`` by rank."""
        for rank, code in enumerate(said):
            if code != said[0]:
                first, other = (DTYPES[c - 1] for c in (said[0], code))
                raise ValueError(
                    "hidden_states must have the same dtype on all ranks of the expert parallel "
                    f"group, got {first} on rank 0 and {other} on rank {rank}"
                )

    def message(self, code: int, value: int) -> str:
        """Return the rule and what was given."""
        if code == self.HIDDEN:
            return f"hidden_states must end in hidden size {self.hidden}, got {value}"
        if code == self.DTYPE:
            got = DTYPES[value] if value >= 0 else "another dtype"
            if self.dtype is None:
                return f"hidden_states must be floating point, got {got}"
            return f"hidden_states must have the experts' dtype {self.dtype}, got {got}"
        if code == self.DEVICE:
            return f"hidden_states must be on the layer's device {self.device}, got another one"
        return (
            f"used_token must have one entry per token, on the layer's device {self.device}, "
            f"got {value} entries"
        )


def dtype_code(dtype: torch.dtype) -> int:
    """Return what stands for an input's dtype in a message, never 0."""
    return 1 + DTYPES.index(dtype)


class CountExchange:
    """Every rank's row counts on every rank; under way from construction until ``wait``.

    Args:
        counts: [n] int64 on the layer's device; this rank's.
        group: expert parallel group, whose ranks all construct one.
        rules: what ``fault`` is about.
        attendance: of the group, for the layer.
        dtype: of this rank's input, without a fault.
        needs: gradients this rank needs, from ``find_needs``.
        fault: code and value of the rule this rank's input breaks, if any.

    Attributes:
        needs: gradients that any rank needs, once ``wait`` has returned.
        attendance: as given.
        what: the forward's name in messages.
    """

    # The first word is a fault's code and, above it, what is needed and the dtype; the second a
    # fault's value, and means nothing where there is none: so padding fills in both.
    CODE_BITS = 8

    def __init__(
        self,
        counts: Tensor,
        group: Any,
        rules: InputRules,
        attendance: Attendance,
        *,
        dtype: torch.dtype | None = None,
        needs: int = 0,
        fault: tuple[int, int] | None = None,
    ) -> None:
        self.group, self.rules = group, rules
        self.rank, self.ep_size = dist.get_rank(group=group), dist.get_world_size(group=group)
        self.needs: BackwardNeeds | None = None
        self.attendance, self.what = attendance, f"forward number {attendance.begin()}"
        said = needs if dtype is None else needs | dtype_code(dtype) << NUM_NEED_BITS
        message = F.pad(counts, (2, 0), value=said << self.CODE_BITS)
        if fault is not None:
            message[0].fill_(fault[0])
            message[1].fill_(fault[1])
        self._gathered = message.new_empty(self.ep_size * message.numel())
        self._message = message  # as long as it is being sent
        self._work = dist.all_gather_into_tensor(
            self._gathered, message, group=group, async_op=True
        )
        self._host, self._arrived = self._gathered, None
        if counts.is_cuda:
            self._work.wait()
            self._host = self._gathered.to("cpu", non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def wait(self) -> tuple[np.ndarray, Tensor]:
        """Wait on the host for the counts of all ranks.

        Returns:
            [W, n] int64 on the host, and the same on the device.

        Raises:
            ValueError: on every rank, if any rank's input has a fault.
            RuntimeError: a rank did not come in time.
        """
        if self._arrived is not None:
            self.attendance.finish_event(self._arrived, self.what)
        else:
            self.attendance.finish(self._work, self._gathered, self.what)
        host = self._host.view(self.ep_size, -1).numpy()
        words = host[:, :2].tolist()
        mask = (1 << self.CODE_BITS) - 1
        self.rules.raise_first([(word & mask, value) for word, value in words])
        said = [word >> self.CODE_BITS for word, _ in words]
        self.rules.raise_if_they_differ([s >> NUM_NEED_BITS for s in said])
        self.needs = BackwardNeeds.agree(said)
        return host[:, 2:], self._gathered.view(self.ep_size, -1)[:, 2:]


class Answer(NamedTuple):
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


class RollCall:
    """Every rank's ``Answer`` on every rank of a host, without its GPU: a page of shared memory.

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
        # Memory without a name, of which killed ranks leave nothing; a file where processes may not
        # open each other's.
        for has_name in (False, True):
            faults = self._share_page(group, has_name)
            if not faults:
                return
        raise RuntimeError(faults[0])

    def _share_page(self, group: Any, has_name: bool) -> list[str]:
        """Map a page that all ranks have; return why some could not, nothing if all could."""
        path, page, error = [None], None, None
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
            if has_name:
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

    def call(self, mine: Answer) -> list[Answer]:
        """Return the answers of all ranks to the same call, by rank.

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
        return [self._read(rank) for rank in range(self.num_ranks)]

    def _read(self, rank: int) -> Answer:
        first, tag, mask = self._first_word(rank), self._tag(), (1 << self.PAYLOAD_BITS) - 1
        start, waited_s, polls = time.monotonic(), 0.0, 0
        while any(self._words[first + i] >> self.PAYLOAD_BITS != tag for i in range(self.WORDS)):
            polls += 1
            if waited_s > POLLING_S:  # the core may have better things to do
                time.sleep(POLL_INTERVAL_S)
            elif polls % 64:
                continue
            else:
                os.sched_yield()  # the other may be waiting for this core
            waited_s = time.monotonic() - start
            self._check(rank, waited_s)
        payload, value = (self._words[first + i] & mask for i in range(self.WORDS))
        flags, needs_mask = payload >> 32, (1 << NUM_NEED_BITS) - 1
        fault = (flags >> 1 + NUM_NEED_BITS, value - 1)
        return Answer(payload & 0xFFFFFFFF, bool(flags & 1), fault, flags >> 1 & needs_mask)

    def _check(self, rank: int, waited_s: float) -> None:
        where = f"rank {rank} of the expert parallel group"
        if _has_ended(self._processes[rank]):
            raise RuntimeError(f"{where}: its process has ended")
        if waited_s > self.timeout_s:
            raise RuntimeError(
                f"{where} did not come to its forward number {self._number} within "
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
