# SPDX-License-Identifier: Apache-2.0
"""The status that the ranks of a host exchange before a forward.

Every rank sees what all others said of the same forward, however late one is; a rank that does not
come in time or has ended is named; no shared memory is left behind, whoever is killed when.
"""

from __future__ import annotations

import builtins
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from helpers.distributed import World, assert_killed_rank_is_named, error_of

from comet_ds.fused.peer.host_status import HostStatusExchange, RankStatus
from comet_ds.validation import InputRules

OK = (InputRules.OK, 0)
STATUS = RankStatus(num_tokens=1, can_fuse=True, fault=OK)


def connect(timeout_s: float) -> HostStatusExchange:
    """Return the exchange of all ranks of the world."""
    return HostStatusExchange(torch.distributed.group.WORLD, timeout_s)


def check_exchange(rank: int, size: int) -> None:
    """Numbers that differ by rank and forward arrive as sent, while ranks take turns being late."""
    statuses = connect(timeout_s=20)
    for number in range(300):
        mine = RankStatus(1000 * rank + number, number % 3 > rank % 2, OK, (number + rank) % 16)
        if rank == number % size and number % 50 == 0:
            time.sleep(0.02)
        found = statuses.exchange(mine)
        assert found[rank] == mine
        assert [s.num_tokens for s in found] == [1000 * r + number for r in range(size)]
        assert [s.can_fuse for s in found] == [number % 3 > r % 2 for r in range(size)]
        assert [s.needs for s in found] == [(number + r) % 16 for r in range(size)]
    same = [statuses.exchange(STATUS) for _ in range(2)]
    assert same[0] is same[1], "what follows from it need not be found again"
    fault = (InputRules.DTYPE, -1) if rank == 1 else OK
    found = statuses.exchange(RankStatus(0, False, fault, 15))[1]
    assert (found.fault, found.needs) == ((InputRules.DTYPE, -1), 15)


@pytest.mark.parametrize("size", [2, 4])
def test_every_rank_sees_every_status(world, size: int) -> None:
    world(size).run(check_exchange)


def check_late(rank: int, size: int) -> str:
    statuses = connect(timeout_s=1)
    if rank == 0:
        return error_of(statuses.exchange, STATUS)
    time.sleep(3)
    return ""


def test_late_rank_is_named_with_its_forward(world) -> None:
    message = world(2).run(check_late)[0]
    assert "rank 1 of the expert parallel group did not reach its forward number 1" in message
    assert "within 1 s" in message


def check_ended(rank: int, size: int, is_reaped: bool) -> str:
    """Rank 1 says it is a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    if is_reaped:
        child.wait()
    else:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    own = os.getpid() if rank == 0 else child.pid
    with mock.patch.object(os, "getpid", lambda: own):
        statuses = connect(timeout_s=100)
    message = error_of(statuses.exchange, STATUS) if rank == 0 else ""
    child.wait()
    return message


@pytest.mark.parametrize("is_reaped", [True, False], ids=["gone", "a zombie"])
def test_ended_process_is_named(world, is_reaped: bool) -> None:
    """Also one that its parent has not waited for yet, which the system still lists."""
    message = world(2).run(check_ended, is_reaped)[0]
    assert message == "rank 1 of the expert parallel group: its process has ended"


def check_killed_before_call(rank: int, size: int) -> None:
    statuses = connect(timeout_s=100)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    statuses.exchange(STATUS)


def test_killed_rank_is_named_by_the_host_status() -> None:
    assert_killed_rank_is_named(check_killed_before_call)


def pages() -> set[Path]:
    """Return the files in which ranks of this host share memory."""
    folders = Path("/dev/shm"), Path(tempfile.gettempdir())
    return {path for folder in folders for path in folder.glob("comet_ds_*")}


def check_killed_in_construction(rank: int, size: int) -> None:
    """All ranks die where the page exists and the others have not opened it."""

    def die(*args: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    torch.distributed.broadcast_object_list = die
    connect(timeout_s=100)


def test_killed_ranks_leave_no_shared_memory() -> None:
    before = pages()
    with pytest.raises(AssertionError, match="its process has ended"):
        World(2, "gloo").run(check_killed_in_construction, timeout=60)
    assert pages() <= before, "left behind"


def check_named_page(rank: int, size: int) -> list[int]:
    """No rank may open another's descriptors, as in containers that forbid it."""
    original = builtins.open

    def refuse(file: Any, *args: Any, **options: Any) -> Any:
        if "/fd/" in str(file):
            raise PermissionError(f"not permitted: {file}")
        return original(file, *args, **options)

    with mock.patch.object(builtins, "open", refuse):
        statuses = connect(timeout_s=20)
    found = statuses.exchange(STATUS._replace(num_tokens=7 + rank))
    return [status.num_tokens for status in found]


def test_a_file_takes_the_place_of_memory_that_is_out_of_reach(world) -> None:
    """It has no name any more once all ranks have it open."""
    before = pages()
    assert world(2).run(check_named_page) == [[7, 8], [7, 8]]
    assert pages() <= before
