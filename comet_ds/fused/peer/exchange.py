# SPDX-License-Identifier: Apache-2.0
"""What the ranks of an expert parallel group share: their memory, and barriers on the GPU.

A rank's peers write routing tables and results into its block of memory. Tokens they write there
too, or they read its own (csrc/peer/exchange.cuh says when). All layers of a group share the
blocks.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from comet_ds.fused.peer.host_status import HostStatusExchange
from comet_ds.fused.peer.layout import TABLES, CallShape, Parts, lay_out
from comet_ds.fused.peer.memory import PeerMemory
from comet_ds.kernels import Kernels
from comet_ds.tuning.policy import SplitPolicy


class Exchange:
    """The memory and the barriers of one group.

    Args:
        memory: the group's.
        kernels: the compiled kernels.
        policy: chooses the CTA splits of the group's layers, which ask it.
        host_status: the group's; None where the caller knows the number of tokens of every rank.
        timeout_s: how long to wait for another rank on the GPU, in seconds.

    Attributes:
        timeout_s, timeout_ns: how long to wait on the GPU.
        late: [2] int64; ``LateWait`` of csrc/peer/exchange.h.
        has_copy_engines: whether copy engines push tokens; otherwise a kernel copies them.
        streams: PeerStreams of csrc/autograd/experts_autograd.h.
    """

    def __init__(
        self,
        memory: PeerMemory,
        kernels: Kernels,
        policy: SplitPolicy,
        host_status: HostStatusExchange | None = None,
        timeout_s: float = 600,
    ) -> None:
        self.memory, self.kernels, self.policy = memory, kernels, policy
        self.host_status = host_status
        self.timeout_s, self.timeout_ns = timeout_s, int(timeout_s * 1e9)
        # How many barriers this rank has entered, and what a GEMM's communication waited for in
        # vain.
        state = torch.zeros(3, dtype=torch.int64, device=memory.block.device)
        self._epoch, self.late = state[:1], state[1:]
        self.has_copy_engines = True
        self.streams = kernels.PeerStreams()
        self._used = [0, 0]  # bytes of the block, from its start and from its end
        self._parts = functools.lru_cache(maxsize=64)(lay_out)

    @property
    def generation(self) -> int:
        """How often the blocks have moved; places of before are not valid any more."""
        return self.streams.generation

    def parts(self, call: CallShape) -> Parts:
        """Return where a call's parts lie in the ranks' blocks, which may have to grow: collective.

        Parts: ``flags``, ``slots``, ``grad_weights``, ``topk_ids``, ``topk_weights``,
        ``slot_in_expert``, ``kept_counts``, ``tokens``, as ``Source`` in csrc/rows/dispatch.h has
        them. Each of the last five has a place for what arrives from the rank at distance 1, the
        rank at distance 2 and so on, with room for the most tokens any rank has; ``tokens`` that
        are pulled has one place, for this rank's own.

        These five lie at the end of the block, where no call keeps anything else: they arrive while
        the receiver may still read the other parts of the call before.
        """
        lasting, incoming, place_bytes = self._parts(call)
        used = [max(self._used[0], lasting.size), max(self._used[1], incoming.size)]
        block = self.memory.block
        self.memory.is_captured |= self.streams.is_captured
        self.memory.reserve(sum(used))
        self.streams.generation += self.memory.block is not block
        self._used = used
        begin = self.memory.block.numel() - incoming.size
        offsets = lasting.offsets | {name: begin + at for name, at in incoming.offsets.items()}
        bases = self.memory.addresses
        addresses = {name: [base + at for base in bases] for name, at in offsets.items()}
        return Parts(call, addresses, place_bytes)

    def places(self, call: CallShape) -> dict[str, Any]:
        """Return the arguments of LayerCall that say where a call's parts lie: by ``parts``.

        Collective where the blocks have to grow.
        """
        parts, rank = self.parts(call), self.memory.rank
        columns = [parts.places(name, rank) for name in (*TABLES, "tokens")]
        columns += [parts.addresses["slots"], parts.addresses["grad_weights"]]
        receivers = [(rank + i) % len(call.num_tokens) for i in range(1, len(call.num_tokens))]
        sent = (*TABLES, "tokens") if call.is_pushed else TABLES
        return {
            "sources": list(zip(*columns, strict=True)),
            "published": 0 if call.is_pushed else parts.addresses["tokens"][rank],
            "flags": parts.addresses["flags"],
            **{name: [parts.place(name, to, rank) for to in receivers] for name in sent},
            "epoch": self._epoch.data_ptr(),
            "late": self.late.data_ptr(),
            "timeout_ns": self.timeout_ns,
            "has_copy_engines": self.has_copy_engines,
        }
