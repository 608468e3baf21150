# SPDX-License-Identifier: Apache-2.0
"""CtaSplit points by a cost model: CTAs that communicate beside a GEMM, and chunks of a layer.

A CTA set apart computes later or stops earlier. Too many and the link or HBM is no faster, too few
and tiles wait for rows, or results for their way out. In forward copy engines may send all tokens
to all ranks while the gate runs, and no CTA pulls. More chunks (path "pipelined") hide more of what
travels, until launches and messages cost more than that. The rates are what an H200 gives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

GEMM_FLOPS = 650e12  # of a GEMM on all SMs, FLOP/s
LINK_BYTES = 340e9  # over NVLink, one direction, bytes/s
MEMORY_BYTES = 3.3e12  # read and written, bytes/s
PULL_BYTES = 50e9  # read and written by one CTA that pulls, bytes/s
PUSH_BYTES = 40e9  # read and written by one CTA that sums and pushes, bytes/s
EXPOSED = 0.6  # share of the time it takes to read a GEMM's weights once more, while rows come
CONTENTION = 0.75  # share of the time it takes to move pulled rows; the GEMM waits for HBM
COPY_BYTES = 370e9  # over NVLink by a copy engine, bytes/s
ROUTING_SECONDS = 40e-6  # from when tokens are there until all ranks know where they go
ROUTING_SECONDS_PER_TOKEN = 4.5e-9
SENT_SECONDS = 10e-6  # for one more meeting and launch
MARGIN = 1.2  # of the work there is to be until rows have come
TILE = 128 * 256  # elements of a result
TILES_UNTIL_PUSH = 2.0  # times a tile takes, from when the last one is begun that a rank waits for
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


class GemmSplit(NamedTuple):
    """How a GEMM shares the GPU with what is pulled or pushed beside it.

    Attributes:
        num_comm_ctas: CTAs that communicate.
        num_split_experts: experts whose rows of this rank's own tokens are computed while other
            ranks' rows travel; their weights are read once more for the rest. 0 where all rows are
            there before the GEMM.
        seconds: time that the communication adds to the layer.
    """

    num_comm_ctas: int
    num_split_experts: int
    seconds: float


class CtaSplit(NamedTuple):
    """What goes on beside the GEMMs of a layer: up, down, and backward through them."""

    pull: GemmSplit
    push: GemmSplit
    pull_grad: GemmSplit
    push_grad: GemmSplit

    @property
    def is_pushed(self) -> bool:
        """Whether copy engines send the tokens before ``up``, so that no CTA pulls them."""
        return self.pull.num_comm_ctas == 0


@dataclass(frozen=True)
class LayerShape:
    """What decides the CTA splits of a layer on a rank.

    Attributes:
        num_tokens: of every rank.
        rank: this one's.
        top_k, num_experts: routes per token, experts of all ranks.
        num_ups: matrices of an expert that read a token, 2 where gated.
        hidden, ffn: H, F.
        dtype: of activations and weights, both of 2 bytes.
        num_sms: of the GPU.
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

    @property
    def mean_tokens(self) -> int:
        """Tokens of a rank, on average."""
        return round(sum(self.num_tokens) / len(self.num_tokens))

    def even(self) -> LayerShape:
        """Return what is the same on all ranks, whatever tokens each has."""
        return replace(self, num_tokens=(self.mean_tokens,) * len(self.num_tokens), rank=0)


def choose_split(shape: LayerShape) -> CtaSplit:
    """Choose the CTA splits of a layer by the cost model; ``Exchange`` remembers them."""
    traffic, flop_per_row = Traffic.expected(shape), 2 * shape.hidden * shape.ffn
    points = token_points(shape.even())  # ranks must agree on whether tokens are sent
    best = min(points, key=lambda point: point.seconds)
    return CtaSplit(
        token_points(shape)[points.index(best)],
        traffic.push_results(flop_per_row),
        traffic.pull(flop_per_row),
        traffic.push(flop_per_row),
    )


def token_points(shape: LayerShape) -> tuple[GemmSplit, GemmSplit]:
    """Return how tokens can come in forward: pulled, or sent."""
    traffic = Traffic.expected(shape)
    return traffic.pull(shape.num_ups * 2 * shape.hidden * shape.ffn), traffic.send()


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
        own_tokens: this rank's.
        tokens: other ranks' tokens that have an expert here.
        rows: their rows.
        all_rows: with those of this rank's own tokens.
        token_bytes: of one.
    """

    num_sms: int
    num_ranks: int
    num_experts: int
    own_tokens: int
    tokens: float
    rows: float
    all_rows: float
    token_bytes: int

    @classmethod
    def expected(cls, shape: LayerShape) -> Traffic:
        """Return the traffic of a layer."""
        num_ranks, total = len(shape.num_tokens), sum(shape.num_tokens)
        own, share = shape.num_tokens[shape.rank], shape.top_k / num_ranks
        foreign = total - own
        is_here = 1 - (1 - 1 / num_ranks) ** shape.top_k
        moved = (foreign * is_here, foreign * share)
        local = shape.num_experts // num_ranks
        return cls(shape.num_sms, num_ranks, local, own, *moved, total * share, 2 * shape.hidden)

    def wire_seconds(self) -> float:
        """Return how long the link takes for tokens there, or sums back."""
        return self.tokens * self.token_bytes / LINK_BYTES

    def pull(self, flop_per_row: float) -> GemmSplit:
        """Choose for pulling beside a GEMM of so many FLOP a row.

        CTAs that have pulled compute.
        """
        gemm = self._gemm(flop_per_row)
        # A weight has two bytes, and two FLOP a row.
        reread = self.num_experts * flop_per_row / MEMORY_BYTES * EXPOSED
        contention = self._moved() / MEMORY_BYTES * CONTENTION

        def share(n: int) -> float:
            busy = self._move(PULL_BYTES, n) * (1 - n / self.num_sms)
            return min(1.0, MARGIN * busy * self.num_ranks / gemm) if gemm else 1.0

        def cost(n: int) -> float:
            pull = self._move(PULL_BYTES, n)
            computed = gemm + share(n) * reread + pull * n / self.num_sms + contention
            return max(computed, pull + gemm * (1 - 1 / self.num_ranks))

        best = min(self._counts(), key=cost)
        num_split_experts = math.ceil(share(best) * self.num_experts)
        return GemmSplit(best, num_split_experts, cost(best) - gemm)

    def send(self) -> GemmSplit:
        """Send tokens while they are routed and this rank's own are brought to their rows."""
        own_rows = self.all_rows - self.rows
        own = (self.own_tokens + own_rows) * self.token_bytes / MEMORY_BYTES
        hidden = ROUTING_SECONDS + ROUTING_SECONDS_PER_TOKEN * self.own_tokens + own
        wire = self.own_tokens * (self.num_ranks - 1) * self.token_bytes / COPY_BYTES
        rows = self._moved() / MEMORY_BYTES
        return GemmSplit(0, 0, max(wire - hidden, 0.0) + SENT_SECONDS + rows)

    def push_results(self, flop_per_row: float) -> GemmSplit:
        """Choose for pushing sums of what a GEMM computes, of so many FLOP a row.

        The CTAs set apart stop computing when the farthest rank's tiles are taken, and push. What
        is left when there are no more tiles is pushed by all. Reading weights once more has not
        been seen to cost anything here.
        """
        gemm = self._gemm(flop_per_row)
        tile_flop = TILE * flop_per_row * 2 / self.token_bytes
        until_push = TILES_UNTIL_PUSH * tile_flop * self.num_sms / GEMM_FLOPS

        def cost(n: int, num_split_experts: int) -> float:
            push, own = (
                self._move(PUSH_BYTES, n),
                num_split_experts / self.num_experts / self.num_ranks,
            )
            # Where all experts are split, results of one rank after the other are complete.
            by_distance = num_split_experts == self.num_experts
            before = gemm * (1 / self.num_ranks if by_distance else 1 - own)
            behind = (gemm - before) * self.num_sms / (self.num_sms - n)
            pushed = min(max(behind - until_push, 0.0) / push, 1.0) if push else 1.0
            return before + behind + (1 - pushed) * self._move(PUSH_BYTES, self.num_sms)

        def fitting(n: int) -> int:
            busy = until_push + self._move(PUSH_BYTES, n)
            own = gemm / self.num_ranks * self.num_sms / (self.num_sms - n)  # of all experts
            share = min(busy / own, 1.0) if own else 1.0
            return max(math.ceil(share * self.num_experts), 1)

        choices = [(n, split) for n in self._counts() for split in (fitting(n), self.num_experts)]
        best = min(choices, key=lambda choice: cost(*choice))
        return GemmSplit(*best, cost(*best) - gemm)

    def push(self, flop_per_row: float) -> GemmSplit:
        """Choose for pushing sums of rows that are there, beside a GEMM of so many FLOP a row.

        CTAs that have pushed compute.
        """
        gemm = self._gemm(flop_per_row)

        def cost(n: int) -> float:
            push = self._move(PUSH_BYTES, n)
            return max(gemm + push * n / self.num_sms, push)

        best = min(self._counts(), key=cost)
        return GemmSplit(best, 0, cost(best) - gemm)

    def _gemm(self, flop_per_row: float) -> float:
        return flop_per_row * self.all_rows / GEMM_FLOPS

    def _moved(self) -> float:
        return (self.tokens + self.rows) * self.token_bytes

    def _move(self, rate: float, n: int) -> float:
        return max(self.wire_seconds(), self._moved() / min(rate * n, MEMORY_BYTES))

    def _counts(self) -> range:
        """Return how many CTAs may be set apart."""
        return range(2, max(self.num_sms // 2, 2) + 1, 2)
