# SPDX-License-Identifier: Apache-2.0
"""Locks for compiling extensions: our own, and removal of torch's stale ones.

Up to version 2.13, torch's lock is a file named ``lock`` in the extension's folder that exists
while a process compiles. A killed process leaves it behind, and every later process silently waits
for its removal. DeepSpeed's own operations are compiled under the same lock. From 2.14 on the file
always exists and the system locks it. Our lock is such a system lock, which ends with its process.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from torch.utils import cpp_extension

TORCH_LOCK, OWN_LOCK = "lock", "comet_ds.lock"
# Whether torch's lock is the existence of the file (up to 2.13).
TORCH_LEAVES_LOCKS = hasattr(cpp_extension, "FileBaton")
REMINDER_S, POLL_S = 30.0, 0.1
# A lock that nobody holds is checked again after this time: its holder may just be creating it or
# removing it.
SETTLING_S = 0.3


@contextlib.contextmanager
def compiling(folder: Path, warn: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock under which one process at a time compiles an extension.

    The system releases the lock when its process ends in whatever way. A stale lock of torch's is
    removed.

    Args:
        folder: the extension's existing folder, which has the extension's name.
        warn: prints a line; called every ``REMINDER_S`` seconds of waiting.
    """
    path = folder / OWN_LOCK
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if _acquire(file, path, warn):
            os.ftruncate(file, 0)
            os.pwrite(file, f"process {os.getpid()} of {socket.gethostname()}".encode(), 0)
            if is_stale(folder / TORCH_LOCK):
                warn(f"removed {folder / TORCH_LOCK}, which nobody holds")
                (folder / TORCH_LOCK).unlink(missing_ok=True)
        yield
    finally:
        os.close(file)


def _acquire(file: int, path: Path, warn: Callable[[str], None]) -> bool:
    """Wait for the lock; return False if the file system does not support locks."""
    start, reminded = time.monotonic(), 0
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            pass
        except OSError as error:
            warn(f"{path} cannot be locked ({error}): set TORCH_EXTENSIONS_DIR to a local folder")
            return False
        waited_s = time.monotonic() - start
        if waited_s >= REMINDER_S * (reminded + 1):
            reminded += 1
            warn(
                f"{waited_s:.0f} s of waiting for {holder(path)}, which compiles "
                f"{path.parent.name} in {path.parent}: end that process to go on without it"
            )
        time.sleep(POLL_S)


def holder(path: Path) -> str | None:
    """Return the last holder of a lock, such as "process 17 of some-host"; None if unknown."""
    with contextlib.suppress(OSError):
        return path.read_text() or None
    return None


def is_held(folder: Path) -> bool:
    """Return whether a process holds our lock of an extension's folder."""
    try:
        file = os.open(folder / OWN_LOCK, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(file)
    return False


def is_stale(lock: Path) -> bool:
    """Return whether torch would wait for a lock that no process of this machine has open.

    A process that compiles has it open. Returns False if this cannot be found out: for another
    user's lock, and without /proc.
    """
    if not TORCH_LEAVES_LOCKS:
        return False
    for attempt in range(2):
        try:
            owner = lock.stat().st_uid
        except OSError:
            return False
        if os.geteuid() not in (0, owner) or not os.path.exists("/proc/self/fd"):
            return False
        if _is_open(os.path.realpath(lock)):
            return False
        if attempt == 0:
            time.sleep(SETTLING_S)
    return True


def _is_open(path: str) -> bool:
    for process in os.listdir("/proc"):
        if not process.isdecimal():
            continue
        with contextlib.suppress(OSError):  # the process has ended, or is another user's
            for entry in os.scandir(f"/proc/{process}/fd"):
                with contextlib.suppress(OSError):
                    if os.readlink(entry.path) == path:
                        return True
    return False


def find_stale_locks(name: str = "*") -> list[Path]:
    """Return torch's stale locks in the folder where it compiles extensions.

    Args:
        name: name of an extension; all extensions by default.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    locks = [*root.glob(f"{name}/{TORCH_LOCK}"), *root.glob(f"*/{name}/{TORCH_LOCK}")]
    return sorted(lock for lock in locks if is_stale(lock))


def describe_stale_lock(lock: Path) -> str:
    """Return a sentence that explains a stale lock and how to remove it."""
    return (
        f"{lock.parent.name} is locked by nobody: a process that was killed, or torch 2.14 or "
        f"later, has left {lock}, and processes that need the extension wait for ever: rm {lock} "
        "(unless another machine with the same folder is compiling it)"
    )
