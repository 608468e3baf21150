# SPDX-License-Identifier: Apache-2.0
"""A cost model: how many CTAs communicate during a GEMM, and into how many chunks a layer is cut.

A CTA that communicates begins to compute later or stops earlier (path "fused"). Too many of them
cost GEMM time and make neither NVLink nor HBM faster; with too few, tiles wait for tokens, or
finished results wait to leave. How many communicate is the CTA split; the paper calls it the
division point. In forward, copy engines may push all tokens to all ranks while the gate runs;
then no CTA pulls.

More chunks (path "pipelined") hide more of the communication, until launches and messages cost
more than they hide.

All decisions are taken with the rates of an H200, whatever the GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from comet_ds.tuning.hardware import H200, NIC_BYTES_PER_S, Hardware

# Path "fused", fitted to H200s.
EXPOSED = 0.6  # a GEMM slows by this share of the time to read its weights a second time
CONTENTION = 0.75  # a GEMM slows by this share of the time that pulled rows take in HBM
ROUTING_SECONDS = 40e-6  # from the gate's input until all ranks know the routing
ROUTING_SECONDS_PER_TOKEN = 4.5e-9
COPY_SECONDS = 10e-6  # a barrier and a launch more where copy engines push
MARGIN = 1.2  # GEMM time to reserve for this rank's own tokens, relative to that of the pulls
TILE = 128 * 256  # elements of a tile of the result
# From the start of the last tile with rows of a rank until its sums can be pushed, in tile times.
TILES_UNTIL_PUSH = 2.0
# Path "pipelined", fitted to two H200s.
NIC_SHARE = 0.85  # of the network's rate, what NCCL reaches
CHUNK_SECONDS = 60e-6  # device time of a chunk beyond its communication and GEMMs
HOST_SECONDS = 3e-3  # of one direction, however many chunks
HOST_CHUNK_SECONDS = 1.1e-3  # and for each chunk
MESSAGE_SECONDS = 2e-6  # for each peer in an all-to-all
MAX_CHUNKS = 8


class GemmSplit(NamedTuple):
    """How the CTAs of one GEMM divide communication and computation.

    Attributes:
        num_comm_ctas: CTAs that communicate.
        num_split_experts: experts whose tiles are computed in two parts: rows of this rank's own
            tokens while other ranks' rows travel, then the rest, which reads the weights a second
            time. 0 where all rows are there before the GEMM begins.
        seconds: time that the communication adds to the layer.
    """

    num_comm_ctas: int
    num_split_experts: int
    seconds: float


class CtaSplit(NamedTuple):
    """The splits of a layer's GEMMs that overlap with communication.

    Attributes:
        pull: tokens are pulled during ``up``.
        push: sums of results are pushed during ``down``.
        pull_grad: gradients of the output are pulled during ``down``'s backward.
        push_grad: sums of the input's gradients are pushed during a weight gradient.
    """

    pull: GemmSplit
    push: GemmSplit
    pull_grad: GemmSplit
    push_grad: GemmSplit

    @property
    def is_pushed(self) -> bool:
        """Whether copy engines push the tokens before ``up``, so that no CTA pulls them."""
        return self.pull.num_comm_ctas == 0

    def describe(self) -> str:
        """Return the split as text: communication CTAs / split experts of each GEMM."""
        return ", ".join(
            f"{name} {split.num_comm_ctas}/{split.num_split_experts}"
            for name, split in self._asdict().items()
        )


@dataclass(frozen=True)
class LayerShape:
    """Sizes of a layer on a rank, from which its CTA split follows.

    Attributes:
        num_tokens: tokens of every rank.
        rank: this rank's index in ``num_tokens``.
        top_k, num_experts: routes per token, experts of all ranks.
        num_ups: matrices of an expert that read a token, 2 where gated.
        hidden, ffn: H, F.
        dtype: of activations and weights, both of 2 bytes.
        num_sms: SMs of the GPU.
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
        """Return the shape with the mean number of tokens on every rank: all ranks get the same."""
        return replace(self, num_tokens=(self.mean_tokens,) * len(self.num_tokens), rank=0)


def choose_split(shape: LayerShape, hardware: Hardware = H200) -> CtaSplit:
    """Choose the CTA split of a layer by the cost model."""
    traffic = Traffic.expected(shape, hardware)
    flop_per_row = 2 * shape.hidden * shape.ffn
    # All ranks must either push their tokens or have them pulled: decide by a shape they share.
    for_all = forward_splits(shape.even(), hardware)
    best = min(range(len(for_all)), key=lambda i: for_all[i].seconds)
    return CtaSplit(
        forward_splits(shape, hardware)[best],
        traffic.push_results(flop_per_row),
        traffic.pull(flop_per_row),
        traffic.push(flop_per_row),
    )


def forward_splits(shape: LayerShape, hardware: Hardware = H200) -> tuple[GemmSplit, GemmSplit]:
    """Return the two ways to bring tokens in forward: pulled by SMs, pushed by copy engines."""
    traffic = Traffic.expected(shape, hardware)
    pulled = traffic.pull(shape.num_ups * 2 * shape.hidden * shape.ffn)
    return pulled, traffic.push_tokens()


@dataclass(frozen=True)
class ChunkedLayer:
    """Sizes of a layer on the pipelined path, from which its number of chunks follows.

    Attributes:
        rows: routes of a rank; all of them travel.
        token_bytes: bytes of a token.
        gemm_seconds: time of the experts' GEMMs, forward and backward.
        num_ranks: W.
        domain: ranks that reach each other by NVLink.
        nic_bytes_per_s: the network, one direction and one GPU.
        hardware: of every rank.
    """

    rows: int
    token_bytes: int
    gemm_seconds: tuple[float, float]
    num_ranks: int
    domain: int
    nic_bytes_per_s: float = NIC_BYTES_PER_S
    hardware: Hardware = H200

    def seconds(self, num_chunks: int) -> tuple[float, float]:
        """Return the time of forward and of backward: the device's or the host's, the longer."""
        host = HOST_SECONDS + num_chunks * HOST_CHUNK_SECONDS
        forward, backward = self.device_seconds(num_chunks)
        return max(forward, host), max(backward, host)

    def device_seconds(self, num_chunks: int) -> tuple[float, float]:
        """Return the device's time for exchange and GEMMs, forward and backward."""
        share = self.rows * self.token_bytes / self.num_ranks  # bytes to one rank
        inside = min(self.domain, self.num_ranks)
        nvlink = self.hardware.nccl_bytes_per_s
        nic = NIC_SHARE * self.nic_bytes_per_s
        # NVLink and the network carry their parts of an all-to-all at the same time.
        wire = max(share * (inside - 1) / nvlink, share * (self.num_ranks - inside) / nic)
        travel = 2 * (wire + num_chunks * self.num_ranks * MESSAGE_SECONDS)
        forward, backward = (
            max(travel, gemm) + min(travel, gemm) / num_chunks + num_chunks * CHUNK_SECONDS
            for gemm in self.gemm_seconds
        )
        return forward, backward

    def best(self) -> int:
        """Return the number of chunks with the shortest forward and backward."""
        return min(range(1, MAX_CHUNKS + 1), key=lambda count: sum(self.seconds(count)))


@dataclass(frozen=True)
class Traffic:
    """Data that one direction moves between this rank and the others, for a uniform routing.

    Attributes:
        num_sms: SMs of the GPU.
        num_ranks: W.
        num_experts: experts of this rank.
        own_tokens: tokens of this rank.
        tokens: tokens of other ranks that have an expert here, each counted once.
        rows: routes of other ranks' tokens to experts here.
        all_rows: these routes and those of this rank's own tokens.
        token_bytes: bytes of a token.
        hardware: of every rank.
    """

    num_sms: int
    num_ranks: int
    num_experts: int
    own_tokens: int
    tokens: float
    rows: float
    all_rows: float
    token_bytes: int
    hardware: Hardware

    @classmethod
    def expected(cls, shape: LayerShape, hardware: Hardware = H200) -> Traffic:
        """Return the traffic of a layer."""
        num_ranks, total = len(shape.num_tokens), sum(shape.num_tokens)
        own, share = shape.num_tokens[shape.rank], shape.top_k / num_ranks
        foreign = total - own
        is_here = 1 - (1 - 1 / num_ranks) ** shape.top_k
        return cls(
            num_sms=shape.num_sms,
            num_ranks=num_ranks,
            num_experts=shape.num_experts // num_ranks,
            own_tokens=own,
            tokens=foreign * is_here,
            rows=foreign * share,
            all_rows=total * share,
            token_bytes=2 * shape.hidden,
            hardware=hardware,
        )

    def wire_seconds(self) -> float:
        """Return the link's time for the tokens that come here, or for the sums that go back."""
        return self.tokens * self.token_bytes / self.hardware.link_bytes_per_s

    def pull(self, flop_per_row: float) -> GemmSplit:
        """Choose how many CTAs pull tokens during a GEMM; each computes once it has pulled.

        Args:
            flop_per_row: FLOP of the GEMM for each row.
        """
        gemm, hardware = self._gemm(flop_per_row), self.hardware
        # A weight has two bytes, and two FLOP for each row.
        reread = self.num_experts * flop_per_row / hardware.memory_bytes_per_s * EXPOSED
        contention = self._moved() / hardware.memory_bytes_per_s * CONTENTION

        def share(n: int) -> float:
            """Return the share of experts to split, so that SMs compute own rows meanwhile."""
            busy = self._move(hardware.cta_pull_bytes_per_s, n) * (1 - n / self.num_sms)
            return min(1.0, MARGIN * busy * self.num_ranks / gemm) if gemm else 1.0

        def cost(n: int) -> float:
            pull = self._move(hardware.cta_pull_bytes_per_s, n)
            computed = gemm + share(n) * reread + pull * n / self.num_sms + contention
            return max(computed, pull + gemm * (1 - 1 / self.num_ranks))

        best = min(self._counts(), key=cost)
        num_split_experts = math.ceil(share(best) * self.num_experts)
        return GemmSplit(best, num_split_experts, cost(best) - gemm)

    def push_tokens(self) -> GemmSplit:
        """Return the cost of copy engines that push all tokens to all ranks.

        The copies overlap with the routing and with the dispatch of this rank's own tokens.
        """
        hardware = self.hardware
        own_rows = self.all_rows - self.rows
        own = (self.own_tokens + own_rows) * self.token_bytes / hardware.memory_bytes_per_s
        hidden = ROUTING_SECONDS + ROUTING_SECONDS_PER_TOKEN * self.own_tokens + own
        pushed_bytes = self.own_tokens * (self.num_ranks - 1) * self.token_bytes
        wire = pushed_bytes / hardware.copy_engine_bytes_per_s
        rows = self._moved() / hardware.memory_bytes_per_s
        return GemmSplit(0, 0, max(wire - hidden, 0.0) + COPY_SECONDS + rows)

    def push_results(self, flop_per_row: float) -> GemmSplit:
        """Choose how many CTAs sum and push what a GEMM computes meanwhile.

        These CTAs stop computing when the farthest rank's tiles are taken, and push. Once there
        are no more tiles, all CTAs push the rest. Reading the weights of split experts a second
        time has not been seen to cost anything here.

        Args:
            flop_per_row: FLOP of the GEMM for each row.
        """
        gemm, hardware = self._gemm(flop_per_row), self.hardware
        push_rate = hardware.cta_push_bytes_per_s
        tile_flop = TILE * flop_per_row * 2 / self.token_bytes
        until_push = TILES_UNTIL_PUSH * tile_flop * self.num_sms / hardware.pass_flops

        def cost(n: int, num_split_experts: int) -> float:
            push = self._move(push_rate, n)
            own = num_split_experts / self.num_experts / self.num_ranks
            # Where all experts are split, results of one rank after the other are complete.
            by_distance = num_split_experts == self.num_experts
            before = gemm * (1 / self.num_ranks if by_distance else 1 - own)
            behind = (gemm - before) * self.num_sms / (self.num_sms - n)
            pushed = min(max(behind - until_push, 0.0) / push, 1.0) if push else 1.0
            return before + behind + (1 - pushed) * self._move(push_rate, self.num_sms)

        def fitting(n: int) -> int:
            """Return the experts to split, so that own rows' tiles last until all is pushed."""
            busy = until_push + self._move(push_rate, n)
            own = gemm / self.num_ranks * self.num_sms / (self.num_sms - n)  # of all experts
            share = min(busy / own, 1.0) if own else 1.0
            return max(math.ceil(share * self.num_experts), 1)

        choices = [(n, split) for n in self._counts() for split in (fitting(n), self.num_experts)]
        best = min(choices, key=lambda choice: cost(*choice))
        return GemmSplit(*best, cost(*best) - gemm)

    def push(self, flop_per_row: float) -> GemmSplit:
        """Choose how many CTAs push sums that are ready, during a GEMM; each computes afterwards.

        Args:
            flop_per_row: FLOP of the GEMM for each row.
        """
        gemm = self._gemm(flop_per_row)

        def cost(n: int) -> float:
            push = self._move(self.hardware.cta_push_bytes_per_s, n)
            return max(gemm + push * n / self.num_sms, push)

        best = min(self._counts(), key=cost)
        return GemmSplit(best, 0, cost(best) - gemm)

    def _gemm(self, flop_per_row: float) -> float:
        return flop_per_row * self.all_rows / self.hardware.pass_flops

    def _moved(self) -> float:
        """Return the bytes that pulling reads and writes, or that summing and pushing does."""
        return (self.tokens + self.rows) * self.token_bytes

    def _move(self, bytes_per_s: float, n: int) -> float:
        """Return the time n CTAs of this rate need: at least the link's, and HBM's."""
        rate = min(bytes_per_s * n, self.hardware.memory_bytes_per_s)
        return max(self.wire_seconds(), self._moved() / rate)

    def _counts(self) -> range:
        """Return how many CTAs may communicate: an even number, at most half of them."""
        return range(2, max(self.num_sms // 2, 2) + 1, 2)
