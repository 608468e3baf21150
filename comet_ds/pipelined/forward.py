# SPDX-License-Identifier: Apache-2.0
"""The pipelined path: token-level dispatch and combine over any process group, chunk by chunk.

Only kept routes travel. The rows are cut into chunks (``routing.ChunkSchedule``); the dispatch of
all chunks is started at once, each chunk is computed when it has arrived, and its combine is
started before the next chunk is computed:

    communication   d0 d1 d2 ...    c0    c1    c2
    computation        e0    e1    e2

Backward mirrors this by construction. A transfer is two autograd nodes, ``_Start`` and ``_Wait``:
the backward of ``_Wait`` starts the opposite all-to-all, the backward of ``_Start`` waits for it,
and autograd runs nodes in reverse order of creation. So the gradients of all combines start at
once, and each chunk's dispatch gradient travels while the chunk before it is computed. The order
is the program's, the same on every rank. On CUDA the collectives run on the process group's own
stream, and waiting is a stream dependency, not a host wait.

All ranks have these nodes in their graphs or none has, whatever each needs (``gradients.py``):

    rows    _Start -> ticket of each chunk -> _Wait -> experts -> _Start -> tickets -> _Wait
    token   anchor ^                           '--------------------^

An anchor attaches the first node, and tokens, empty tensors as well, the others, so that a chunk's
exchanges do not depend on what its experts do. The backward of each is made of the other, and can
be differentiated itself.

What backward knows of the routing it takes from saved tensors. Where activation checkpointing
computes the forward again and draws other routes, they are those of the second time, as is all
that experts save; a number of rows that has changed is an error, torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from deepspeed import comm as dist
from torch import Tensor

from comet_ds.pipelined.counts import CountExchange
from comet_ds.pipelined.grouped_mlp import ExpertRunner
from comet_ds.pipelined.plan import Chunk, ChunkSchedule, RoutingPlan, expert_major_order
from comet_ds.pipelined.row_ops import sum_rows, sum_rows_backward
from comet_ds.ranks.gradients import anchor, first_order_only
from comet_ds.ranks.waiting import BACKWARD, FORWARD

Timed = Callable[[str], AbstractContextManager]


def pipelined_forward(
    x: Tensor,
    topk_weights: Tensor,
    plan: RoutingPlan,
    runner: ExpertRunner,
    schedule: ChunkSchedule,
    exchange: CountExchange | None,
    timed: Timed,
) -> Tensor:
    """Compute the layer's output for this rank's tokens.

    Args:
        x: [T, H]; T may differ between ranks and be 0.
        topk_weights: [T, K] fp32.
        plan: the rows' order, from the same routing.
        runner: this rank's experts.
        schedule: how the rows are cut; the same on all ranks.
        exchange: the counts of all ranks, under way; None without expert parallelism.
        timed: context of a named timer around each exposed wait ("1st_a2a", "2nd_a2a").

    Returns:
        [T, H] in the experts' output dtype; may be differentiated twice. With expert parallelism
        collective over its group, forward and backward. Waits on the host once, for the counts that
        size the buffers; not at all for grouped GEMM without expert parallelism.
    """
    rows = _Permute.apply(x, plan.token_of_row, plan.row_of_route)
    if exchange is None:
        outputs = _run_local(rows, plan, runner, schedule)
    else:
        outputs = _run_chunks(rows, runner, schedule, exchange, timed)
    return _Combine.apply(outputs, topk_weights, plan.row_of_route)


def _run_local(
    rows: Tensor, plan: RoutingPlan, runner: ExpertRunner, schedule: ChunkSchedule
) -> Tensor:
    """Run all experts on rows that stay here: one chunk, segments are the experts."""
    experts = range(schedule.num_local_experts)
    offsets, host_counts = plan.tokens_per_segment.cumsum(0, dtype=torch.int32), None
    if runner.reason is not None:
        host_counts = plan.tokens_per_segment.tolist()
        rows = rows[: sum(host_counts)]
    if runner.container is not None:
        segments = [(0, expert, count) for expert, count in enumerate(host_counts)]
        return runner.run_all(rows, segments, 1, schedule.num_local_experts)
    return runner.run(rows, experts, runner.stack(experts), offsets, host_counts)


def _run_chunks(
    rows: Tensor,
    runner: ExpertRunner,
    schedule: ChunkSchedule,
    exchange: CountExchange,
    timed: Timed,
) -> Tensor:
    """Dispatch, compute and return the rows chunk by chunk."""
    host_counts, counts = exchange.wait()
    arrivals = [_Arrival(chunk, host_counts, counts, exchange) for chunk in schedule.chunks]
    outward = [a.transfer for a in arrivals]
    sizes = [transfer.num_sent for transfer in outward]
    pieces = rows.split([*sizes, rows.shape[0] - sum(sizes)])[:-1]
    head = anchor(rows, torch.is_grad_enabled() and exchange.needs.input)
    tickets = _Start.apply(outward, head, *pieces)
    stacks, returning = {}, []
    if runner.container is not None:
        returning = _run_at_once(arrivals, tickets, runner, exchange, schedule)
        arrivals = tickets = []
    for arrival, ticket in zip(arrivals, tickets, strict=True):
        with timed("1st_a2a"):
            received, token = _Wait.apply([arrival.transfer], ticket)
        experts = arrival.chunk.experts
        if experts not in stacks:  # where first used: backward hands out gradients soonest
            stacks[experts] = runner.stack(experts)
        outputs = arrival.run(received, runner, stacks[experts])
        returning.append(_send_back(arrival, token, outputs, exchange))
    back, tickets = zip(*returning, strict=True)
    with timed("2nd_a2a"):
        return torch.cat(_Wait.apply(back, *tickets)[:-1])


def _run_at_once(
    arrivals: Sequence[_Arrival],
    tickets: Sequence[Tensor],
    runner: ExpertRunner,
    exchange: CountExchange,
    schedule: ChunkSchedule,
) -> list[tuple[Transfer, Tensor]]:
    """Wait for all chunks, compute them in one call, start their return.

    The collectives are in the order of a rank that computes chunk by chunk, in backward too.
    """
    waited = [_Wait.apply([a.transfer], t) for t, a in zip(tickets, arrivals, strict=True)]
    received = [rows for rows, _ in waited]
    segments = [segment for arrival in arrivals for segment in arrival.segments]
    sizes = (exchange.ep_size, schedule.num_local_experts)
    outputs = runner.run_all(torch.cat(received), segments, *sizes)
    returning = []
    pieces = outputs.split([piece.shape[0] for piece in received])
    for piece, arrival, (_, token) in zip(pieces, arrivals, waited, strict=True):
        returning.append(_send_back(arrival, token, piece, exchange))
    return returning


def _send_back(
    arrival: _Arrival, token: Tensor, outputs: Tensor, exchange: CountExchange
) -> tuple[Transfer, Tensor]:
    """Start a chunk's results on their way, with a backward on all ranks or on none."""
    if not token.requires_grad:
        has_backward = torch.is_grad_enabled() and exchange.needs.experts
        token = anchor(outputs, has_backward)
    back = arrival.transfer.opposite()
    return back, *_Start.apply([back], token, outputs)


class _Arrival:
    """One chunk as it arrives on this rank: how many rows, from whom, for which expert."""

    def __init__(
        self, chunk: Chunk, host_counts: np.ndarray, counts: Tensor, exchange: CountExchange
    ) -> None:
        ep_size, rank, num_experts = exchange.ep_size, exchange.rank, len(chunk.experts)
        segments = slice(chunk.first_segment, chunk.first_segment + ep_size * num_experts)
        by_rank = (ep_size, ep_size, num_experts)  # source, destination, expert
        table = host_counts[:, segments].reshape(by_rank)
        self.chunk = chunk
        rows = np.stack([table[rank].sum(axis=1), table[:, rank].sum(axis=1)])
        self.transfer = Transfer(torch.from_numpy(rows), exchange)
        self.segments = [
            (source, expert, count)
            for source, counts in enumerate(table[:, rank].tolist())
            for expert, count in zip(chunk.experts, counts, strict=True)
        ]
        self.rows_per_expert = table[:, rank].sum(axis=0).tolist()
        self.counts = counts[:, segments].view(by_rank)[:, rank]

    def run(self, rows: Tensor, runner: ExpertRunner, stacked: list[Tensor | None]) -> Tensor:
        """Run the chunk's experts on rows in order of arrival; the result is in that order."""
        reorder = len(self.chunk.experts) > 1
        if reorder:
            order, inverse, offsets = expert_major_order(self.counts, rows.shape[0])
            rows = _Reorder.apply(rows, order, inverse)
        else:
            offsets = self.counts.sum(dim=0, dtype=torch.int32)
        outputs = runner.run(rows, self.chunk.experts, stacked, offsets, self.rows_per_expert)
        return _Reorder.apply(outputs, inverse, order) if reorder else outputs


class Transfer:
    """An all-to-all of rows, started in one place and waited for in another.

    Args:
        counts: [2, W] int64, CPU; rows to each rank of the group, and rows from each.
        exchange: of the same forward.
        is_backward: whether gradients travel.

    Attributes:
        reverse: the transfer of the gradients, while a backward is under way.
    """

    def __init__(
        self, counts: Tensor, exchange: CountExchange, *, is_backward: bool = False
    ) -> None:
        self.counts, self.exchange, self.is_backward = counts, exchange, is_backward
        self.reverse: Transfer | None = None
        self._pending: tuple[Any, Tensor, Tensor] | None = None

    @property
    def num_sent(self) -> int:
        return int(self.counts[0].sum())

    def opposite(self, counts: Tensor | None = None) -> Transfer:
        """Return the transfer the other way round, in backward where counts are given."""
        is_backward = counts is not None
        counts = counts if is_backward else self.counts
        return Transfer(counts.flip(0), self.exchange, is_backward=is_backward)

    def start(self, rows: Tensor) -> None:
        """Start sending [num_sent, H]."""
        send, receive = self.counts.tolist()
        rows = rows.contiguous()
        arriving = rows.new_empty(sum(receive), rows.shape[1])
        work = dist.all_to_all_single(
            arriving, rows, receive, send, group=self.exchange.group, async_op=True
        )
        self._pending = work, rows, arriving

    def wait(self) -> Tensor:
        """Make what follows wait for the transfer; return what it brings."""
        work, _, arriving = self._pending
        part = BACKWARD if self.is_backward else FORWARD
        self.exchange.attendance.finish(work, arriving, f"{part} {self.exchange.what}")
        self._pending = None
        return arriving


class _Start(torch.autograd.Function):
    """Start transfers; the results are empty tickets that tie ``_Wait`` to it in the graph."""

    @staticmethod
    def forward(
        ctx: Any, transfers: Sequence[Transfer], token: Tensor, *rows: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.transfers, ctx.has_anchor = transfers, token.is_leaf
        for transfer, piece in zip(transfers, rows, strict=True):
            transfer.start(piece)
        return tuple(piece.new_empty(0) for piece in rows)

    @staticmethod
    def backward(ctx: Any, *tickets: Tensor) -> tuple[Tensor | None, ...]:
        reverse = [transfer.reverse for transfer in ctx.transfers]
        *rows, token = _Wait.apply(reverse, *tickets)
        return None, None if ctx.has_anchor else token, *rows


class _Wait(torch.autograd.Function):
    """Wait for started transfers; return what they bring, and a token for the next ``_Start``."""

    @staticmethod
    def forward(ctx: Any, transfers: Sequence[Transfer], *tickets: Tensor) -> tuple[Tensor, ...]:
        ctx.transfers = transfers
        ctx.save_for_backward(*(transfer.counts for transfer in transfers))
        return *(transfer.wait() for transfer in transfers), tickets[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *grads, token = grads
        ctx.transfers[0].exchange.needs.check_present()
        if torch.is_grad_enabled() and not token.requires_grad:
            token = anchor(token)
        for transfer, counts in zip(ctx.transfers, ctx.saved_tensors, strict=True):
            transfer.reverse = transfer.opposite(counts)
        reverse = [transfer.reverse for transfer in ctx.transfers]
        return None, *_Start.apply(reverse, token, *grads)


class _Reorder(torch.autograd.Function):
    """rows[order]; a permutation's gradient is the inverse permutation, no scatter needed."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return _Reorder.apply(grad, inverse, order), None, None


class _Permute(torch.autograd.Function):
    """[T, H] to [T * K, H]: the token of every row, rows of dropped routes last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token_of_row: Tensor, row_of_route: Tensor) -> Tensor:
        ctx.save_for_backward(token_of_row, row_of_route)
        return x.index_select(0, token_of_row)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Unpermute.apply(grad, *ctx.saved_tensors), None, None


class _Unpermute(torch.autograd.Function):
    """[T * K, H] to [T, H]: the sum of every token's rows; adjoint of the above for kept routes."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, token_of_row: Tensor, row_of_route: Tensor) -> Tensor:
        ctx.save_for_backward(token_of_row, row_of_route)
        return sum_rows(rows.contiguous(), row_of_route)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Permute.apply(grad, *ctx.saved_tensors), None, None


class _Combine(torch.autograd.Function):
    """[R, H] to [T, H]: every token's weighted sum; R may count the rows of dropped routes."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, row_of_route: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, row_of_route)
        return sum_rows(rows.contiguous(), row_of_route, weights.contiguous())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return *_CombineBackward.apply(grad, *ctx.saved_tensors), None


class _CombineBackward(torch.autograd.Function):
    """[T, H], [R, H] and [T, K] to the gradients of ``_Combine``, of which it is the adjoint.

    Rows are w * grad and weights are <grad, row>: again linear in each of the three.
    """

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, rows: Tensor, weights: Tensor, row_of_route: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(grad, rows, weights, row_of_route)
        return _combine_backward(grad, rows, weights, row_of_route)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, for_rows: Tensor, for_weights: Tensor) -> tuple[Tensor | None, ...]:
        grad, rows, weights, row_of_route = ctx.saved_tensors
        for_rows, for_weights = for_rows.contiguous(), for_weights.contiguous()
        of_grad = sum_rows(for_rows, row_of_route, weights.contiguous())
        of_grad += sum_rows(rows.contiguous(), row_of_route, for_weights)
        return of_grad, *_combine_backward(grad, for_rows, for_weights, row_of_route), None


def _combine_backward(
    grad: Tensor, rows: Tensor, weights: Tensor, row_of_route: Tensor
) -> tuple[Tensor, Tensor]:
    return sum_rows_backward(
        grad.contiguous(), rows.contiguous(), row_of_route, weights.contiguous()
    )
