# SPDX-License-Identifier: Apache-2.0
"""An expert parallel group on one GPU: a stream a rank, ordinary memory in place of the peers'.

Everything between ranks on the fused path runs as on real ones, but for NVLink.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from comet_ds import MoE
from comet_ds.fused.call import CallSizes
from comet_ds.fused.peer.connect import origin_of
from comet_ds.fused.peer.exchange import Exchange
from comet_ds.kernels import load_kernels
from comet_ds.tuning.cost_model import CtaSplit, GemmSplit
from comet_ds.tuning.policy import SplitPolicy
from helpers.parity import build, named_grads

SENT = GemmSplit(0, 0, 0.0)
BLOCK_BYTES = 2**26
TIMEOUT_S = 20
NUM_SMS = 132
NUM_QUEUES = 8  # of a GPU: CUDA_DEVICE_MAX_CONNECTIONS


def both_ways(cta_split: CtaSplit) -> list[CtaSplit]:
    """Return the same with tokens sent, and with tokens pulled, as they always are in backward."""
    return [cta_split._replace(pull=pull) for pull in (SENT, cta_split.pull_grad)]


class VirtualMemory:
    """``PeerMemory`` of a rank; all ranks' blocks are in this process."""

    def __init__(self, blocks: Sequence[Tensor], rank: int) -> None:
        self.rank, self.block = rank, blocks[rank]
        self.addresses = [block.data_ptr() for block in blocks]
        self.is_captured = False

    def reserve(self, num_bytes: int) -> None:
        assert num_bytes <= BLOCK_BYTES, "make BLOCK_BYTES larger"


class VirtualGroup:
    """W ranks with a layer each, which run forward and backward together."""

    def __init__(self, num_ranks: int, *, timeout_s: float = TIMEOUT_S, **options: Any) -> None:
        self.layers = [
            build(MoE, rank, ep_size=num_ranks, device="cuda", **options)
            for rank in range(num_ranks)
        ]
        kernels = load_kernels(torch.device("cuda", 0))
        blocks = [
            torch.zeros(BLOCK_BYTES, dtype=torch.uint8, device="cuda") for _ in range(num_ranks)
        ]
        origin = origin_of(torch.device("cuda", 0), kernels)
        self.exchanges = [
            Exchange(VirtualMemory(blocks, rank), kernels, SplitPolicy(origin), timeout_s=timeout_s)
            for rank in range(num_ranks)
        ]
        for exchange in self.exchanges:
            # What waits for another rank must not stand in a queue before that rank's copies.
            exchange.has_copy_engines = False
        self.streams = [torch.cuda.Stream() for _ in range(num_ranks)]
        if 2 * num_ranks > NUM_QUEUES:  # one stream of a rank, not two, may wait for the others
            for exchange, stream in zip(self.exchanges, self.streams, strict=True):
                exchange.streams.set_side(stream.cuda_stream)
        self._alone = VirtualGroup(1, **options) if num_ranks > 1 else None
        self._loaded: set[int] = set()
        self._gates = threading.Lock()  # they draw from one generator
        torch.cuda.synchronize()

    def load(self, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        """Load the kernels for inputs of these sizes on one rank alone.

        CUDA loads a kernel at its first launch and waits for what runs, which would wait for a rank
        that comes after.
        """
        alone, counts = self._alone, not self.layers[0].deepspeed_moe.gate.drop_tokens
        for x, grad in zip(inputs, grads, strict=True):
            if alone is None or x.shape[0] in self._loaded:
                continue
            with mock.patch.object(CallSizes, "counts_rows", counts):
                alone.exchanges[0].policy.pinned = None
                alone.run([x], [grad])
                for cta_split in both_ways(alone.layers[0].deepspeed_moe.fused.cta_split):
                    alone.exchanges[0].policy.pinned = cta_split
                    alone.run([x], [grad])
            self._loaded.add(x.shape[0])

    def forward(self, inputs: Sequence[Tensor], ranks: Sequence[int] | None = None) -> list[Tensor]:
        """Enqueue the forward of the ranks (of all, unless some are absent)."""
        num_tokens = tuple(x.shape[0] for x in inputs)
        weights = []
        for layer, x in zip(self.layers, inputs, strict=True):  # tables are made with a host wait
            moe = layer.deepspeed_moe
            weights.append(moe.fused.recognise(moe.experts.deepspeed_experts, x))
            # All ranks' kernels fit on the GPU together, as on GPUs of their own.
            weights[-1].num_sms = NUM_SMS // len(self.layers) // 2 * 2
        torch.cuda.synchronize()

        def run(rank: int) -> tuple[Tensor, Tensor]:
            moe = self.layers[rank].deepspeed_moe
            with torch.cuda.stream(self.streams[rank]):
                with self._gates:
                    torch.manual_seed(7)
                    sizes = (num_tokens, moe.gate, self.exchanges[rank])
                    call = moe.fused.prepare(weights[rank], *sizes)
                    routing = moe.gate.route(call.begin(inputs[rank]))
                moe.routing = routing.detach()
                return call.run(routing), routing.l_aux

        ranks = range(len(self.layers)) if ranks is None else ranks
        if self.layers[0].deepspeed_moe.gate.drop_tokens:
            return [run(rank) for rank in ranks]
        # The host of each rank waits for the others' tables, to count its rows.
        with ThreadPoolExecutor(len(ranks)) as pool:
            return list(pool.map(run, ranks))

    def run(self, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Run forward and backward; return what ``parity.run`` does, by rank."""
        self.load(inputs, grads)
        inputs = [x.detach().clone().requires_grad_() for x in inputs]
        for layer in self.layers:
            layer.zero_grad()
        outputs = self.forward(inputs)
        for (output, l_aux), grad, stream in zip(outputs, grads, self.streams, strict=True):
            with torch.cuda.stream(stream):
                torch.autograd.backward([output, l_aux], [grad, torch.ones_like(l_aux)])
        torch.cuda.synchronize()
        return [
            {"output": output.detach(), "l_aux": l_aux.detach(), "grad of x": x.grad}
            | named_grads(layer)
            for (output, l_aux), x, layer in zip(outputs, inputs, self.layers, strict=True)
        ]
