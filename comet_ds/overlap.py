# SPDX-License-Identifier: Apache-2.0
"""Division points by a cost model: CTAs that communicate beside a GEMM, and chunks of a layer.

A CTA set apart computes later or stops earlier. Too many and the link or HBM is no faster, too few
and tiles wait for rows, or results for their way out. More chunks (path "pipelined") hide more of
what travels, until launches and messages cost more than that. The rates are what an H200 gives.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

GEMM_FLOPS = 650e12  # of a GEMM on all SMs, FLOP/s
LINK_BYTES = 340e9  # over NVLink, one direction, bytes/s
MEMORY_BYTES = 3.3e12  # read and written, bytes/s
PULL_BYTES = 50e9  # read and written by one CTA that pulls, bytes/s
PUSH_BYTES = 40e9  # read and written by one CTA that sums and pushes, bytes/s
EXPOSED = 0.6  # share of the time it takes to read a GEMM's operand once more
MARGIN = 1.2  # of the work there is to be until rows have come
# Of the pipelined path: torch's grouped GEMM, NCCL over NVLink and a 400 Gbit/s network, the share
# of a network's rate that is reached, what every chunk costs the device beside its work, and how
# long the host is busy in each direction, at least and for every chunk.
PIPELINED_FLOPS = 650e12
NCCL_LINK_BYTES = 230e9
NIC_BYTES = 50e9
NIC_SHARE = 0.85
CHUNK_SECONDS = 60e-6
HOST_SECONDS = 3e-3
HOST_CHUNK_SECONDS = 1.1e-3
MESSAGE_SECONDS = 2e-6  # for every peer of an all-to-all
MAX_CHUNKS = 8


class Pull(NamedTuple):
    """How tokens are pulled beside a GEMM.

    Attributes:
        num_ctas: CTAs that begin with it.
        num_split: experts whose rows of this rank's tokens are computed meanwhile; their weights
            are read once more for the rest.
        seconds: what the GEMM takes longer.
    """

    num_ctas: int
    num_split: int
    seconds: float


class Push(NamedTuple):
    """How sums of rows are pushed beside a GEMM.

    Attributes:
        num_ctas: CTAs set apart.
        first_panel: slices of columns that are pushed together, each slice behind them alone; 0
            where the rows are there before the GEMM.
        seconds: what the GEMM takes longer.
    """

    num_ctas: int
    first_panel: int
    seconds: float


class Division(NamedTuple):
    """What goes on beside the GEMMs of a layer: up, down, and backward through them."""

    pull: Pull
    push: Push
    pull_grad: Pull
    push_grad: Push


@dataclass(frozen=True)
class LayerShape:
    """What decides the division points of a layer on a rank.

    Attributes:
        num_tokens: of every rank.
        rank: this one's.
        top_k, num_experts: routes per token, experts of all ranks.
        num_ups: matrices of an expert that read a token, 2 where gated.
        hidden, ffn: H, F.
        dtype: of activations and weights, both of 2 bytes.
        num_sms: of the GPU.
        num_slices: slices of a row that are summed at a time.
    """

    num_tokens: tuple[int, ...]
    rank: int
    top_k: int
    num_experts: int
    num_ups: int
    hidden: int
    ffn: int
    dtype: str
    num_sms: int
    num_slices: int


def divide(shape: LayerShape) -> Division:
    """Choose the division points of a layer by the cost model; ``Exchange`` remembers them."""
    traffic, flop_per_row = Traffic.expected(shape), 2 * shape.hidden * shape.ffn
    return Division(
        traffic.pull(shape.num_ups * flop_per_row),
        traffic.push_panels(flop_per_row, shape.num_slices),
        traffic.pull(flop_per_row),
        traffic.push(flop_per_row),
    )


@dataclass(frozen=True)
class ChunkedLayer:
    """What decides the chunks of a layer on the pipelined path.

    Attributes:
        rows: routes of a rank, which all travel.
        token_bytes: of one.
        gemm_seconds: forward, backward.
        num_ranks: W.
        domain: ranks that reach each other by NVLink.
        nic_bytes: over the network, one direction and one GPU, bytes/s.
    """

    rows: int
    token_bytes: int
    gemm_seconds: tuple[float, float]
    num_ranks: int
    domain: int
    nic_bytes: float = NIC_BYTES

    def seconds(self, num_chunks: int) -> tuple[float, float]:
        """Return the time of exchange and GEMMs, or the host's, forward and backward."""
        host = HOST_SECONDS + num_chunks * HOST_CHUNK_SECONDS
        forward, backward = self.device_seconds(num_chunks)
        return max(forward, host), max(backward, host)

    def device_seconds(self, num_chunks: int) -> tuple[float, float]:
        """Return the time of exchange and GEMMs, forward and backward."""
        share = self.rows * self.token_bytes / self.num_ranks  # to one rank
        inside = min(self.domain, self.num_ranks)
        # All-to-alls of a domain and between them run at one time.
        nic = NIC_SHARE * self.nic_bytes
        wire = max(share * (inside - 1) / NCCL_LINK_BYTES, share * (self.num_ranks - inside) / nic)
        travel = 2 * (wire + num_chunks * self.num_ranks * MESSAGE_SECONDS)
        forward, backward = (
            max(travel, gemm) + min(travel, gemm) / num_chunks + num_chunks * CHUNK_SECONDS
            for gemm in self.gemm_seconds
        )
        return forward, backward

    def best(self) -> int:
        """Return the number of chunks that takes least."""
        return min(range(1, MAX_CHUNKS + 1), key=lambda count: sum(self.seconds(count)))


@dataclass(frozen=True)
class Traffic:
    """What one direction moves between this rank and the others, as expected of a uniform routing.

    Attributes:
        num_sms: of the GPU.
        num_ranks: W.
        num_experts: of this rank.
        tokens: other ranks' tokens that have an expert here.
        rows: their rows.
        all_rows: with those of this rank's own tokens.
        token_bytes: of one.
    """

    num_sms: int
    num_ranks: int
    num_experts: int
    tokens: float
    rows: float
    all_rows: float
    token_bytes: int

    @classmethod
    def expected(cls, shape: LayerShape) -> Traffic:
        """Return the traffic of a layer."""
        num_ranks, total = len(shape.num_tokens), sum(shape.num_tokens)
        foreign, share = total - shape.num_tokens[shape.rank], shape.top_k / num_ranks
        is_here = 1 - (1 - 1 / num_ranks) ** shape.top_k
        moved = (foreign * is_here, foreign * share)
        local = shape.num_experts // num_ranks
        return cls(shape.num_sms, num_ranks, local, *moved, total * share, 2 * shape.hidden)

    def wire_seconds(self) -> float:
        """Return how long the link takes for tokens there, or sums back."""
        return self.tokens * self.token_bytes / LINK_BYTES

    def pull(self, flop_per_row: float) -> Pull:
        """Choose for pulling beside a GEMM of so many FLOP a row.

        CTAs that have pulled compute.
        """
        gemm = self._gemm(flop_per_row)
        # A weight has two bytes, and two FLOP a row.
        reread = self.num_experts * flop_per_row / MEMORY_BYTES * EXPOSED

        def share(n: int) -> float:
            busy = self._move(PULL_BYTES, n) * (1 - n / self.num_sms)
            return min(1.0, MARGIN * busy * self.num_ranks / gemm) if gemm else 1.0

        def cost(n: int) -> float:
            pull = self._move(PULL_BYTES, n)
            computed = gemm + share(n) * reread + pull * n / self.num_sms
            return max(computed, pull + gemm * (1 - 1 / self.num_ranks))

        best = self._best(cost)
        return Pull(best, math.ceil(share(best) * self.num_experts), cost(best) - gemm)

    def push(self, flop_per_row: float) -> Push:
        """Choose for pushing sums of rows that are there, beside a GEMM of so many FLOP a row.

        CTAs that have pushed compute.
        """
        gemm = self._gemm(flop_per_row)

        def cost(n: int) -> float:
            push = self._move(PUSH_BYTES, n)
            return max(gemm + push * n / self.num_sms, push)

        best = self._best(cost)
        return Push(best, 0, cost(best) - gemm)

    def push_panels(self, flop_per_row: float, num_slices: int) -> Push:
        """Choose for pushing sums of what a GEMM computes, slice by slice of its columns.

        The CTAs set apart stop computing with the first panel's tiles and push. What is left when
        there are no more tiles is pushed by all.

        Args:
            flop_per_row: of the GEMM.
            num_slices: slices of a row.
        """
        gemm = self._gemm(flop_per_row)
        # Every panel reads the GEMM's operand, whose rows have flop_per_row / hidden bytes.
        reread = self.all_rows * flop_per_row * 2 / self.token_bytes / MEMORY_BYTES * EXPOSED

        def cost(n: int, first: int) -> float:
            total = gemm + (num_slices - first) * reread
            before = total * first / num_slices
            behind = (total - before) * self.num_sms / (self.num_sms - n)
            push = self._move(PUSH_BYTES, n)
            pushed = min(behind / push if push else 1.0, 1 - 1 / num_slices)
            return before + behind + (1 - pushed) * self._move(PUSH_BYTES, self.num_sms)

        choices = []
        for first in range(1, num_slices + 1):
            best = self._best(functools.partial(cost, first=first))
            choices.append(Push(best, first, cost(best, first) - gemm))
        return min(choices, key=lambda choice: choice.seconds)

    def _gemm(self, flop_per_row: float) -> float:
        return flop_per_row * self.all_rows / GEMM_FLOPS

    def _move(self, rate: float, n: int) -> float:
        moved = (self.tokens + self.rows) * self.token_bytes
        return max(self.wire_seconds(), moved / min(rate * n, MEMORY_BYTES))

    def _best(self, cost: Callable[[int], float]) -> int:
        return min(range(2, max(self.num_sms // 2, 2) + 1, 2), key=cost)
