# SPDX-License-Identifier: Apache-2.0
"""One block of device memory a rank, which all ranks of an expert parallel group address.

It grows when a forward needs more, on all ranks in the same forward.
"""

from __future__ import annotations

import functools
import os
import subprocess
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from deepspeed import comm as dist
from torch import Tensor

from comet_ds._compat.torch import symmetric_memory

GROWTH_BYTES = 2**25  # blocks grow in steps of this
ASKING_S = 10  # for nvidia-smi to answer


@functools.cache
def describe_link() -> str:
    """Return what joins this host's GPUs, as the first of them has it: "18 NVLinks"."""
    command = ["nvidia-smi", "nvlink", "-s", "-i", "0"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=ASKING_S)
    except (OSError, subprocess.TimeoutExpired):
        return "links nvidia-smi does not tell"
    links = done.stdout.decode().count("GB/s")
    return f"{links} NVLinks" if links else "no NVLink"


class PeerMemory(Protocol):
    """One block of device memory a rank.

    Attributes:
        rank: this rank in the group.
        block: [bytes] uint8; this rank's.
        addresses: of every rank's block, in this process.
        is_captured: whether a CUDA graph has these addresses.
    """

    rank: int
    block: Tensor
    addresses: Sequence[int]
    is_captured: bool

    def reserve(self, num_bytes: int) -> None:
        """Make all blocks at least this large, zero when new. Collective when they grow."""


class SymmetricMemory:
    """``PeerMemory`` from torch's symmetric memory. Multicast is never used.

    Args:
        group: process group; all its ranks construct one.
        device: this rank's.

    Attributes:
        is_captured: whether a CUDA graph has the addresses of a block.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        self.device, self.rank, self.is_captured = device, dist.get_rank(group=group), False
        self.block = torch.empty(0, dtype=torch.uint8, device=device)
        self.addresses: Sequence[int] = ()
        self._group = weakref.ref(group)  # whose end is the memory's
        self._handle: Any = None
        self._retired: list[tuple[Tensor, Any]] = []  # what graphs still write to

    def reserve(self, num_bytes: int) -> None:
        old = self.block.numel()
        if num_bytes <= old:
            return
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"the memory of the expert parallel group must grow to {num_bytes} bytes, which a "
                "CUDA graph cannot capture: run inputs of all sizes once before"
            )
        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"  # read by rendezvous
        size = -(-max(num_bytes, 2 * old) // GROWTH_BYTES) * GROWTH_BYTES
        group, fault, block = self._group(), None, self.block
        try:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()  # this memory does not come from torch's cache
            block = symmetric_memory().empty(size, dtype=torch.uint8, device=self.device)
            block.zero_()
            torch.cuda.synchronize(self.device)
        except RuntimeError as error:
            fault = f"rank {dist.get_rank()}: {error}"
        # Also: nobody uses the old blocks any more.
        raise_first(fault, group, f"no symmetric memory of {size} bytes")
        handle = symmetric_memory().rendezvous(block, group)
        addresses = [base + getattr(handle, "offset", 0) for base in handle.buffer_ptrs]
        assert addresses[self.rank] == block.data_ptr()
        if self.is_captured:
            self._retired.append((self.block, self._handle))
        self.block, self.addresses, self._handle = block, addresses, handle
        dist.barrier(group=group)


def raise_first(fault: str | None, group: Any, what: str) -> None:
    """Raise RuntimeError on all ranks of a group where one has a fault. Collective."""
    faults: list[Any] = [None] * dist.get_world_size(group=group)
    torch.distributed.all_gather_object(faults, fault, group=group)
    if found := next((f for f in faults if f is not None), None):
        raise RuntimeError(f"{what}: {found}")
