# SPDX-License-Identifier: Apache-2.0
"""Running test functions on several ranks: persistent gloo worlds of spawned processes."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch.distributed import TCPStore

CALL_TIMEOUT_S = 240
KILLED_TIMEOUT_S = 60  # far below what a rank would wait for another
GRACE_S = 10
MANY_THREADS = 300  # of a rank; a gloo group has three, for as long as the process lives


class World:
    """W processes with one process group, which run functions until closed.

    Importing torch and DeepSpeed takes seconds, so tests share a world; every call starts with
    DeepSpeed's group tables empty.
    """

    def __init__(self, size: int, backend: str = "gloo") -> None:
        from comet_ds.op_builder.locks import find_stale_locks  # ranks choose an accelerator first

        self.size = size
        for lock in find_stale_locks():  # of worlds that were killed
            lock.unlink()
        context = mp.get_context("spawn")
        # Here, not in a rank: a port found free may be another's when a rank comes to listen.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._pipes, self._processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, size, self._store.port, backend, theirs), daemon=True
            )
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(
        self, function: Callable[..., Any], *args: Any, timeout: float = CALL_TIMEOUT_S
    ) -> list[Any]:
        """Run ``function(rank, size, *args)`` on every rank; return the results by rank.

        Raises:
            AssertionError: with every rank's traceback, where one raised or did not return in time;
                the world is then closed.
        """
        for pipe in self._pipes:
            pipe.send((function, args))
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        results, failures = [None] * self.size, []
        deadline = time.monotonic() + timeout
        while waiting:
            ready = wait(list(waiting), timeout=max(deadline - time.monotonic(), 0))
            if not ready:
                failures += [f"rank {rank}: no answer" for rank in waiting.values()]
                break
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    ok, value = pipe.recv()
                except EOFError:
                    ok, value = False, "its process has ended"
                results[rank] = value
                if not ok:
                    failures.append(f"rank {rank}:\n{value}")
                    # The others may now wait in a collective for good.
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        if failures:
            self.close()
            raise AssertionError("\n".join(failures))
        return results

    @property
    def is_open(self) -> bool:
        """Whether the processes can still be used."""
        return bool(self._processes)

    @property
    def has_many_threads(self) -> bool:
        """Whether so many groups were made that their threads, which poll, slow everything down."""
        status = Path(f"/proc/{self._processes[0].pid}/status") if self.is_open else None
        if status is None or not status.exists():
            return False
        return int(status.read_text().split("Threads:")[1].split()[0]) > MANY_THREADS

    def close(self) -> None:
        """Kill the processes, and remove the shared memory DeepSpeed's CPU backend leaves."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes = []
        for path in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{self._store.port}_*"):
            path.unlink()


def _serve(rank: int, size: int, port: int, backend: str, pipe: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # the parent's, as under torch's launcher
    )
    torch.set_num_threads(1)
    if backend == "gloo":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    if backend == "nccl":
        torch.cuda.set_device(rank)
    deepspeed.init_distributed(
        dist_backend=backend, timeout=timedelta(seconds=CALL_TIMEOUT_S), verbose=False
    )
    while True:
        function, args = pipe.recv()
        _reset_deepspeed()
        torch.manual_seed(rank)
        try:
            answer = True, function(rank, size, *args)
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send(answer)


def _reset_deepspeed() -> None:
    """Forget the groups and the model parallel unit of the call before."""
    from deepspeed.utils import groups

    for name in dir(groups):
        table = getattr(groups, name)
        if name.startswith("_EXPERT") and isinstance(table, dict):
            table.clear()
    groups.mpu = None
    groups.expert_tensor_parallel_world_size = 1


def assert_killed_rank_is_named(check: Callable[..., Any], backend: str = "gloo") -> None:
    """Assert that rank 0 says so in time where rank 1 of two kills itself in ``check``."""
    world, start = World(2, backend), time.monotonic()
    try:
        world.run(check, timeout=KILLED_TIMEOUT_S)
    except AssertionError as failure:
        assert "rank 1 of the expert parallel group: its process has ended" in str(failure)
    else:
        raise AssertionError("nobody missed the rank that was killed")
    assert time.monotonic() - start < KILLED_TIMEOUT_S


def error_of(function: Callable[..., Any], *args: Any) -> str:
    """Return the message of the ValueError or RuntimeError that a call raises."""
    try:
        function(*args)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "no error"
