# SPDX-License-Identifier: Apache-2.0
"""The chunk schedule and the routing plan: which row holds which token.

A route is a token and one of its K experts. A row is a route in the order of the dispatch. With
expert parallelism this order is

    chunk, destination rank, local expert, token

so that the rows that one chunk sends to one rank are contiguous, and so are the rows that one
expert receives from one rank. A chunk is a group of local experts, or, if a rank has fewer experts
than the number of chunks asked for, one expert and a part of the tokens.

Worked example: 2 ranks with 2 experts each (rank 0 owns experts 0 and 1, rank 1 owns 2 and 3), 2
chunks, so chunk 0 is the first expert of every rank and chunk 1 the second. On a rank whose three
tokens chose experts 3, 0 and 2:

    dispatch order of the experts   0 2 | 1 3        (chunk 0 | chunk 1)
    rows                            token 1 (to rank 0), token 2 (to rank 1) | token 0 (to rank 1)
    row_of_route                    [[2], [0], [1]]
    tokens_per_segment              [1, 1, 0, 1]
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from comet_ds.kernels import Kernels, current_stream, load_kernels


@dataclass(frozen=True)
class Chunk:
    """One step of the pipeline.

    Attributes:
        experts: local experts that compute the chunk.
        first_segment: index, in dispatch order, of the chunk's first (rank, expert) segment. Its
            ep_size * len(experts) segments are contiguous, rank-major.
    """

    experts: range
    first_segment: int


@dataclass(frozen=True)
class ChunkSchedule:
    """How the routes of an EP group are cut into chunks; the same on all its ranks.

    Attributes:
        ep_size: ranks in the EP group.
        num_local_experts: experts on each rank.
        num_chunks: number of chunks asked for; ``len(chunks)`` may be larger, because a chunk is
            made of whole experts or of an equal part of one.
    """

    ep_size: int
    num_local_experts: int
    num_chunks: int

    @property
    def num_token_parts(self) -> int:
        """Number of parts the tokens are cut into; 1 unless chunks outnumber local experts."""
        return -(-self.num_chunks // self.num_local_experts)

    @cached_property
    def expert_groups(self) -> list[range]:
        """Contiguous groups of local experts; their sizes differ by at most one."""
        num_groups = min(self.num_chunks, self.num_local_experts)
        cuts = [i * self.num_local_experts // num_groups for i in range(num_groups + 1)]
        return [range(lo, hi) for lo, hi in itertools.pairwise(cuts)]

    @cached_property
    def chunks(self) -> list[Chunk]:
        """The chunks in dispatch order."""
        chunks, first = [], 0
        for experts in self.expert_groups:
            for _ in range(self.num_token_parts):
                chunks.append(Chunk(experts, first))
                first += self.ep_size * len(experts)
        return chunks

    @property
    def num_segments(self) -> int:
        """Number of (chunk, rank, expert) segments."""
        return self.num_token_parts * self.ep_size * self.num_local_experts

    @cached_property
    def segment_of_expert(self) -> Tensor:
        """[num_token_parts, E] int64, CPU; the segment of a global expert and a token part."""
        table = torch.empty(
            self.num_token_parts, self.ep_size, self.num_local_experts, dtype=torch.int64
        )
        for i, chunk in enumerate(self.chunks):
            size = len(chunk.experts)
            segments = chunk.first_segment + torch.arange(self.ep_size * size)
            part = i % self.num_token_parts
            columns = slice(chunk.experts.start, chunk.experts.stop)
            table[part, :, columns] = segments.view(self.ep_size, size)
        return table.flatten(1)


@dataclass(frozen=True)
class RoutingPlan:
    """The row order of one forward, reused in its backward.

    Attributes:
        row_of_route: [T, K] int64; row of each route, -1 = dropped.
        token_of_row: [T * K] int64; token of each row. Rows of dropped routes are last and are not
            dispatched.
        tokens_per_segment: [num_segments] int64; rows of each segment, in dispatch order.
    """

    row_of_route: Tensor
    token_of_row: Tensor
    tokens_per_segment: Tensor


def plan_routes(topk_ids: Tensor, segment_of_expert: Tensor) -> RoutingPlan:
    """Order the routes by segment, tokens ascending within a segment. No host synchronisation.

    Args:
        topk_ids: [T, K] int64, -1 = dropped.
        segment_of_expert: [P, E] int64 on the same device, from ``ChunkSchedule``; the tokens are
            cut into P equal parts.
    """
    kernels = load_kernels(topk_ids.device)
    if kernels is not None and segment_of_expert.numel() <= kernels.max_segments:
        return _plan_routes_cuda(kernels, topk_ids.contiguous(), segment_of_expert)
    num_tokens, top_k = topk_ids.shape
    num_parts, num_experts = segment_of_expert.shape
    num_routes, num_segments = num_tokens * top_k, num_parts * num_experts
    device = topk_ids.device
    if num_parts > 1:
        part = torch.arange(num_tokens, device=device) * num_parts // max(num_tokens, 1)
        topk_ids = torch.where(topk_ids < 0, -1, topk_ids + part.unsqueeze(1) * num_experts)
    # The index -1 of a dropped route selects the appended last entry, which is no segment.
    table = F.pad(segment_of_expert.flatten(), (0, 1), value=num_segments)
    segment = table[topk_ids.flatten()]
    sorted_segment, route_of_row = torch.sort(segment, stable=True)
    rows = torch.arange(num_routes, device=device)
    rows_or_dropped = rows.masked_fill(sorted_segment == num_segments, -1)
    row_of_route = torch.empty_like(rows).scatter_(0, route_of_row, rows_or_dropped)
    counts = torch.zeros(num_segments + 1, dtype=torch.int64, device=device)
    counts.scatter_add_(0, segment, torch.ones_like(segment))
    return RoutingPlan(
        row_of_route=row_of_route.view(num_tokens, top_k),
        token_of_row=route_of_row // top_k,
        tokens_per_segment=counts[:-1],
    )


def _plan_routes_cuda(kernels: Kernels, topk_ids: Tensor, segment_of_expert: Tensor) -> RoutingPlan:
    num_blocks = -(-topk_ids.numel() // kernels.routes_per_block)
    num_segments = segment_of_expert.numel()
    row_of_route = torch.empty_like(topk_ids)
    token_of_row = topk_ids.new_empty(topk_ids.numel())
    counts = topk_ids.new_empty(num_segments)
    scratch = topk_ids.new_empty(num_blocks, num_segments + 1, dtype=torch.int32)
    tensors = (topk_ids, segment_of_expert, row_of_route, token_of_row, counts, scratch)
    kernels.plan_routes(
        *(t.data_ptr() for t in tensors),
        *topk_ids.shape,
        *segment_of_expert.shape,
        current_stream(topk_ids),
    )
    return RoutingPlan(row_of_route, token_of_row, counts)


def expert_major_order(counts: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the permutation from order of arrival (rank-major) to expert-major order.

    Worked example: 2 ranks, 2 experts and counts [[1, 2], [1, 0]], that is rows e0r0 e1r0 e1r0
    e0r1, give order [0, 3, 1, 2] and offsets [2, 4].

    Args:
        counts: [W, n] int64, first dimension may be strided; number of rows received from each rank
            for each of n experts.
        num_rows: sum of the counts, known on the host.

    Returns:
        order, inverse: [num_rows] int64; ``rows[order]`` is expert-major, ranks ascending within
            an expert; ``rows[order][inverse]`` equals ``rows``.
        offsets: [n] int32; end of each expert's rows in expert-major order.
    """
    kernels = load_kernels(counts.device)
    if kernels is not None and counts.numel() <= kernels.max_segments:
        return _expert_major_order_cuda(kernels, counts, num_rows)
    flat = counts.flatten()
    start = (flat.cumsum(0) - flat).view_as(counts).t().flatten()
    sizes = counts.t().flatten()
    ends = sizes.cumsum(0)
    rows = torch.arange(num_rows, device=counts.device)
    shift = start - (ends - sizes)
    order = torch.repeat_interleave(shift, sizes, output_size=num_rows) + rows
    inverse = torch.empty_like(order).scatter_(0, order, rows)
    last = counts.shape[0] - 1
    return order, inverse, ends[last :: counts.shape[0]].to(torch.int32)


def _expert_major_order_cuda(
    kernels: Kernels, counts: Tensor, num_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    order, inverse = counts.new_empty(2, num_rows)
    offsets = counts.new_empty(counts.shape[1], dtype=torch.int32)
    kernels.order_arrival(
        counts.data_ptr(),
        counts.stride(0),
        order.data_ptr(),
        inverse.data_ptr(),
        offsets.data_ptr(),
        num_rows,
        *counts.shape,
        current_stream(counts),
    )
    return order, inverse, offsets
