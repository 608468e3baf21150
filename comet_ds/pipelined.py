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
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from deepspeed import comm as dist
from torch import Tensor

from comet_ds.agreement import CountExchange
from comet_ds.grouped_mlp import ExpertRunner
from comet_ds.routing import Chunk, ChunkSchedule, RoutingPlan, expert_major_order
from comet_ds.row_ops import sum_rows, sum_rows_backward

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
        [T, H] in the experts' output dtype. With expert parallelism collective over its group,
        forward and backward. Waits on the host once, for the counts that size the buffers; not at
        all for grouped GEMM without expert parallelism.
    """
    rows = _Permute.apply(x, plan)
    if exchange is None:
        outputs = _run_local(rows, plan, runner, schedule)
    else:
        outputs = _run_chunks(rows, runner, schedule, exchange, timed)
    return _Combine.apply(outputs, topk_weights, plan)


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
    sizes = [sum(a.transfer.send) for a in arrivals]
    pieces = rows.split([*sizes, rows.shape[0] - sum(sizes)])
    tickets = [_Start.apply(p, a.transfer) for p, a in zip(pieces, arrivals, strict=False)]
    stacks, returning = {}, []
    if runner.container is not None:
        returning = _run_at_once(arrivals, tickets, runner, exchange, schedule)
        arrivals = tickets = []
    for arrival, ticket in zip(arrivals, tickets, strict=True):
        with timed("1st_a2a"):
            received = _Wait.apply(ticket, arrival.transfer)
        back = Transfer(arrival.transfer.receive, arrival.transfer.send, exchange.group)
        experts = arrival.chunk.experts
        if experts not in stacks:  # where first used: backward hands out gradients soonest
            stacks[experts] = runner.stack(experts)
        outputs = arrival.run(received, runner, stacks[experts])
        returning.append((_Start.apply(outputs, back), back))
    with timed("2nd_a2a"):
        return torch.cat([_Wait.apply(ticket, back) for ticket, back in returning])


def _run_at_once(
    arrivals: Sequence[_Arrival],
    tickets: Sequence[Tensor],
    runner: ExpertRunner,
    exchange: CountExchange,
    schedule: ChunkSchedule,
) -> list[tuple[Tensor, Transfer]]:
    """Wait for all chunks, compute them in one call, start their return.

    The collectives are in the order of a rank that computes chunk by chunk, in backward too.
    """
    received = [_Wait.apply(t, a.transfer) for t, a in zip(tickets, arrivals, strict=True)]
    segments = [segment for arrival in arrivals for segment in arrival.segments]
    sizes = (exchange.ep_size, schedule.num_local_experts)
    outputs = runner.run_all(torch.cat(received), segments, *sizes)
    returning = []
    pieces = outputs.split([piece.shape[0] for piece in received])
    for piece, arrival in zip(pieces, arrivals, strict=True):
        back = Transfer(arrival.transfer.receive, arrival.transfer.send, exchange.group)
        returning.append((_Start.apply(piece, back), back))
    return returning


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
        self.transfer = Transfer(
            send=table[rank].sum(axis=1).tolist(),
            receive=table[:, rank].sum(axis=1).tolist(),
            group=exchange.group,
        )
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

    Attributes:
        send: rows to each rank of the group, in order of the ranks.
        receive: rows from each.
        group: process group.
    """

    def __init__(self, send: list[int], receive: list[int], group: Any) -> None:
        self.send, self.receive, self.group = send, receive, group
        self._pending: tuple[Any, Tensor, Tensor] | None = None

    def start(self, rows: Tensor, *, reverse: bool = False) -> None:
        """Start sending [sum(send), H]; with ``reverse`` the two directions swap."""
        send, receive = (self.receive, self.send) if reverse else (self.send, self.receive)
        rows = rows.contiguous()
        arriving = rows.new_empty(sum(receive), rows.shape[1])
        work = dist.all_to_all_single(
            arriving, rows, receive, send, group=self.group, async_op=True
        )
        self._pending = work, rows, arriving

    def wait(self) -> Tensor:
        """Make what follows wait for the transfer; return what it brings."""
        work, _, arriving = self._pending
        work.wait()
        self._pending = None
        return arriving


class _Start(torch.autograd.Function):
    """Start a transfer; the result is an empty ticket that ties ``_Wait`` to it in the graph."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        transfer.start(rows)
        return rows.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.transfer.wait(), None


class _Wait(torch.autograd.Function):
    """Wait for a started transfer and return its rows."""

    @staticmethod
    def forward(ctx: Any, ticket: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        return transfer.wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.transfer.start(grad, reverse=True)
        return grad.new_empty(0), None


class _Reorder(torch.autograd.Function):
    """rows[order]; a permutation's gradient is the inverse permutation, no scatter needed."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, *ctx.saved_tensors), None, None


class _Permute(torch.autograd.Function):
    """[T, H] to [T * K, H]: the token of every row, rows of dropped routes last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: RoutingPlan) -> Tensor:
        ctx.plan = plan
        return x.index_select(0, plan.token_of_row)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return sum_rows(grad.contiguous(), ctx.plan.row_of_route), None


class _Combine(torch.autograd.Function):
    """[R, H] to [T, H]: every token's weighted sum; R may count the rows of dropped routes."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, plan: RoutingPlan) -> Tensor:
        rows, weights = rows.contiguous(), weights.contiguous()
        ctx.plan = plan
        ctx.save_for_backward(rows, weights)
        return sum_rows(rows, plan.row_of_route, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weights = ctx.saved_tensors
        grads = sum_rows_backward(grad.contiguous(), rows, ctx.plan.row_of_route, weights)
        return *grads, None
