# SPDX-License-Identifier: Apache-2.0
"""Locks around compiling: ours, which ends with its process, and torch's, which may not.

Up to 2.13, torch's is a file named ``lock`` in the folder of an extension, there while somebody
compiles it. A process that is killed leaves it, and every later one waits for it to go away, in
silence. DeepSpeed's own operations are compiled under it too. From 2.14 on the file stays, and the
system locks it.
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
# Whether torch waits for the file to go away.
TORCH_LEAVES_LOCKS = hasattr(cpp_extension, "FileBaton")
REMINDER_S, POLL_S = 30.0, 0.1
# A lock whose holder is just leaving, or has just come, is looked at again after this.
SETTLING_S = 0.3


@contextlib.contextmanager
def compiling(folder: Path, warn: Callable[[str], None]) -> Iterator[None]:
    """Let one process of all that share a folder compile an extension in it.

    The system ends the lock with the process that has it, however that ends. torch's lock of one
    that was killed is removed.

    Args:
        folder: the extension's, which exists; its name is the extension's.
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
    """Wait for the lock; return False where the file system has none."""
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
    """Return who has or had the lock at a path: "process 17 of some-host", None if nobody yet."""
    with contextlib.suppress(OSError):
        return path.read_text() or None
    return None


def is_held(folder: Path) -> bool:
    """Return whether a process compiles the extension of a folder now, under our lock."""
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

    Whoever compiles does have it open. False where that cannot be told: for another user's lock,
    and without /proc.
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
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            for entry in os.scandir(f"/proc/{process}/fd"):
                with contextlib.suppress(OSError):
                    if os.readlink(entry.path) == path:
                        return True
    return False


def find_stale_locks(name: str = "*") -> list[Path]:
    """Return torch's locks that nobody holds, in the folder where it compiles extensions.

    Args:
        name: of the extension; all of them if left out.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    locks = [*root.glob(f"{name}/{TORCH_LOCK}"), *root.glob(f"*/{name}/{TORCH_LOCK}")]
    return sorted(lock for lock in locks if is_stale(lock))


def describe_stale_lock(lock: Path) -> str:
    """Return what a stale lock does, and how to clear it."""
    return (
        f"{lock.parent.name} is locked by nobody: a process that was killed, or torch 2.14 or "
        f"later, has left {lock}, and whoever needs it waits for ever: rm {lock} (unless another "
        "machine that has this folder compiles it now)"
    )
