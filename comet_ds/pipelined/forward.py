# SPDX-License-Identifier: Apache-2.0
"""The pipelined path: token-level dispatch and combine over any process group, chunk by chunk.

Only kept routes are sent. The rows are cut into chunks (``plan.ChunkSchedule``). The dispatch of
all chunks is started at once; each chunk is computed when it has arrived, and its combine is
started before the next chunk is computed:

    communication   d0 d1 d2 ...    c0    c1    c2
    computation        e0    e1    e2

Backward mirrors this by construction. A transfer is two autograd nodes, ``_Start`` and ``_Wait``:
the backward of ``_Wait`` starts the opposite all-to-all, the backward of ``_Start`` waits for it,
and autograd runs nodes in reverse order of creation. So the gradients of all combines start at
once, and each chunk's dispatch gradient is sent while the chunk before it is computed. The order
is the program's, the same on every rank. On CUDA the collectives run on the process group's own
stream, and waiting is a stream dependency, not a host wait.

Either all ranks have these nodes in their graphs or none has, whatever gradients each needs
(``ranks/gradients.py``). Empty tensors, called edges, connect the nodes:

    rows    _Start -> edge of each chunk -> _Wait -> experts -> _Start -> edges -> _Wait
    edge    anchor ^                          '--------------------^

An anchor (a leaf) puts the first node into the graph. The lower edges put the others there even if
an expert detaches its output. The backward of each node applies the other, so it can itself be
differentiated.

The backward reads the routing from saved tensors. If activation checkpointing recomputes the
forward and draws other routes, the backward uses the recomputed routes and activations; if the
number of rows has changed, torch raises an error.
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

Timed = Callable[[str], AbstractContextManager]  # a timer's name to a context that times


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
        plan: the order of the rows, made from the same routing.
        runner: runs this rank's experts.
        schedule: how the rows are cut into chunks; the same on all ranks.
        exchange: the started exchange of row counts; None without expert parallelism.
        timed: gives the context of a named timer ("1st_a2a", "2nd_a2a") around each exposed wait.

    Returns:
        [T, H] in the experts' output dtype; can be differentiated twice.

    With expert parallelism forward and backward are collective over the group. The host waits once,
    for the counts that size the buffers; without expert parallelism, grouped GEMM needs no wait.
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
    """Run all experts without expert parallelism: one chunk whose segments are the experts."""
    experts = range(schedule.num_local_experts)
    offsets = plan.tokens_per_segment.cumsum(0, dtype=torch.int32)
    if runner.reason is None:  # grouped GEMM does not wait for the counts
        return runner.run(rows, experts, runner.stack(experts), offsets, None)
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
    """Dispatch, compute and combine the rows chunk by chunk; return them in dispatch order."""
    host_counts, counts = exchange.wait()
    chunks = [_ReceivedChunk(chunk, host_counts, counts, exchange) for chunk in schedule.chunks]
    dispatches = [chunk.dispatch for chunk in chunks]
    sizes = [dispatch.num_sent_rows for dispatch in dispatches]
    rows_to_send = rows.split([*sizes, rows.shape[0] - sum(sizes)])[:-1]  # without dropped routes
    first_edge = anchor(rows, torch.is_grad_enabled() and exchange.needs.input)
    edges = _Start.apply(dispatches, first_edge, *rows_to_send)
    if runner.container is not None:
        started = _run_container(chunks, edges, runner, exchange, schedule)
    else:
        started = []
        weights: dict[range, list[Tensor | None]] = {}
        for chunk, edge in zip(chunks, edges, strict=True):
            with timed("1st_a2a"):
                received, edge = _Wait.apply([chunk.dispatch], edge)
            # Stacked at first use, so that backward finishes the weights' gradients early.
            if chunk.experts not in weights:
                weights[chunk.experts] = runner.stack(chunk.experts)
            outputs = chunk.run(received, runner, weights[chunk.experts])
            started.append(_start_combine(chunk, edge, outputs, exchange))
    combines, edges = zip(*started, strict=True)
    with timed("2nd_a2a"):
        return torch.cat(_Wait.apply(combines, *edges)[:-1])


def _run_container(
    chunks: Sequence[_ReceivedChunk],
    edges: Sequence[Tensor],
    runner: ExpertRunner,
    exchange: CountExchange,
    schedule: ChunkSchedule,
) -> list[tuple[Transfer, Tensor]]:
    """Wait for all chunks, run the user's container on them in one call, start their combines.

    Collectives are issued in the same order as on a rank that computes chunk by chunk, forward and
    backward, because other ranks may have no container.
    """
    waited = [_Wait.apply([c.dispatch], edge) for c, edge in zip(chunks, edges, strict=True)]
    received = [rows for rows, _ in waited]
    segments = [segment for chunk in chunks for segment in chunk.segments]
    sizes = (exchange.ep_size, schedule.num_local_experts)
    outputs = runner.run_all(torch.cat(received), segments, *sizes)
    outputs = outputs.split([rows.shape[0] for rows in received])
    return [
        _start_combine(chunk, edge, rows, exchange)
        for rows, chunk, (_, edge) in zip(outputs, chunks, waited, strict=True)
    ]


def _start_combine(
    chunk: _ReceivedChunk, edge: Tensor, outputs: Tensor, exchange: CountExchange
) -> tuple[Transfer, Tensor]:
    """Start to send a chunk's outputs back; return the transfer and the edge to wait with."""
    if not edge.requires_grad:  # all ranks have a backward here, or none has
        has_backward = torch.is_grad_enabled() and exchange.needs.experts
        edge = anchor(outputs, has_backward)
    combine = chunk.dispatch.opposite()
    return combine, *_Start.apply([combine], edge, outputs)


class _ReceivedChunk:
    """One chunk as this rank receives it.

    Attributes:
        experts: local experts that compute it.
        dispatch: transfer that brings its rows.
        segments: (source rank, local expert, number of rows), in order of arrival.
        rows_per_expert: number of rows of each expert, on the host.
        counts: [W, n] int64 on the device; rows from each rank for each of the n experts.
    """

    def __init__(
        self, chunk: Chunk, host_counts: np.ndarray, counts: Tensor, exchange: CountExchange
    ) -> None:
        ep_size, rank, num_experts = exchange.ep_size, exchange.rank, len(chunk.experts)
        segments = slice(chunk.first_segment, chunk.first_segment + ep_size * num_experts)
        shape = (ep_size, ep_size, num_experts)  # source, destination, expert
        table = host_counts[:, segments].reshape(shape)
        self.experts = chunk.experts
        sent_and_received = np.stack([table[rank].sum(axis=1), table[:, rank].sum(axis=1)])
        self.dispatch = Transfer(torch.from_numpy(sent_and_received), exchange)
        self.segments = [
            (source, expert, count)
            for source, from_source in enumerate(table[:, rank].tolist())
            for expert, count in zip(chunk.experts, from_source, strict=True)
        ]
        self.rows_per_expert = table[:, rank].sum(axis=0).tolist()
        self.counts = counts[:, segments].view(shape)[:, rank]

    def run(self, rows: Tensor, runner: ExpertRunner, weights: list[Tensor | None]) -> Tensor:
        """Run the chunk's experts on rows in order of arrival; return outputs in that order."""
        has_many = len(self.experts) > 1
        if has_many:
            order, inverse, offsets = expert_major_order(self.counts, rows.shape[0])
            rows = _Reorder.apply(rows, order, inverse)
        else:
            offsets = self.counts.sum(dim=0, dtype=torch.int32)
        outputs = runner.run(rows, self.experts, weights, offsets, self.rows_per_expert)
        return _Reorder.apply(outputs, inverse, order) if has_many else outputs


class Transfer:
    """An all-to-all of rows that is started and waited for separately.

    Args:
        counts: [2, W] int64, CPU; number of rows sent to each rank of the group, and received from
            each.
        exchange: the forward's exchange of counts; gives the group and the bounded wait.
        is_backward: whether the rows are gradients.

    Attributes:
        reverse: the transfer of the gradients; None outside of a backward.
    """

    def __init__(
        self, counts: Tensor, exchange: CountExchange, *, is_backward: bool = False
    ) -> None:
        self.counts, self.exchange, self.is_backward = counts, exchange, is_backward
        self.reverse: Transfer | None = None
        self._pending: tuple[Any, Tensor, Tensor] | None = None

    @property
    def num_sent_rows(self) -> int:
        """Number of rows this rank sends."""
        return int(self.counts[0].sum())

    def opposite(self, counts: Tensor | None = None) -> Transfer:
        """Return the transfer in the opposite direction.

        Args:
            counts: [2, W]; this transfer's counts as saved for backward, for the transfer of its
                gradients. None for a transfer of the same forward.
        """
        is_backward = counts is not None
        counts = counts if is_backward else self.counts
        return Transfer(counts.flip(0), self.exchange, is_backward=is_backward)

    def start(self, rows: Tensor) -> None:
        """Start to send [num_sent_rows, H]."""
        send, receive = self.counts.tolist()
        rows = rows.contiguous()
        received = rows.new_empty(sum(receive), rows.shape[1])
        work = dist.all_to_all_single(
            received, rows, receive, send, group=self.exchange.group, async_op=True
        )
        self._pending = work, rows, received  # the sent rows must stay alive as well

    def wait(self) -> Tensor:
        """Return the received rows; waits on the current stream, for CPU tensors on the host."""
        assert self._pending is not None, "start() comes first"
        work, _, received = self._pending
        part = BACKWARD if self.is_backward else FORWARD
        self.exchange.attendance.finish(work, received, f"{part} {self.exchange.what}")
        self._pending = None
        return received


class _Start(torch.autograd.Function):
    """Start transfers; return an edge (an empty tensor) for the ``_Wait`` of each."""

    @staticmethod
    def forward(
        ctx: Any, transfers: Sequence[Transfer], edge: Tensor, *rows: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.transfers, ctx.has_anchor = transfers, edge.is_leaf
        for transfer, own_rows in zip(transfers, rows, strict=True):
            transfer.start(own_rows)
        return tuple(own_rows.new_empty(0) for own_rows in rows)

    @staticmethod
    def backward(ctx: Any, *edges: Tensor) -> tuple[Tensor | None, ...]:
        reverse = [transfer.reverse for transfer in ctx.transfers]
        *grads, edge = _Wait.apply(reverse, *edges)
        return None, None if ctx.has_anchor else edge, *grads


class _Wait(torch.autograd.Function):
    """Wait for started transfers; return their rows, and an edge for the next ``_Start``."""

    @staticmethod
    def forward(ctx: Any, transfers: Sequence[Transfer], *edges: Tensor) -> tuple[Tensor, ...]:
        ctx.transfers = transfers
        ctx.save_for_backward(*(transfer.counts for transfer in transfers))
        return *(transfer.wait() for transfer in transfers), edges[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *rows, edge = grads
        ctx.transfers[0].exchange.needs.check_present()
        if torch.is_grad_enabled() and not edge.requires_grad:
            edge = anchor(edge)
        for transfer, counts in zip(ctx.transfers, ctx.saved_tensors, strict=True):
            transfer.reverse = transfer.opposite(counts)
        reverse = [transfer.reverse for transfer in ctx.transfers]
        return None, *_Start.apply(reverse, edge, *rows)


class _Reorder(torch.autograd.Function):
    """rows[order]; the gradient is a gather with the inverse permutation, without atomics."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return _Reorder.apply(grad, inverse, order), None, None


class _Permute(torch.autograd.Function):
    """[T, H] to [T * K, H]: copy each row's token; rows of dropped routes are last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token_of_row: Tensor, row_of_route: Tensor) -> Tensor:
        ctx.save_for_backward(token_of_row, row_of_route)
        return x.index_select(0, token_of_row)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Unpermute.apply(grad, *ctx.saved_tensors), None, None


class _Unpermute(torch.autograd.Function):
    """[T * K, H] to [T, H]: sum each token's kept rows; the adjoint of ``_Permute``."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, token_of_row: Tensor, row_of_route: Tensor) -> Tensor:
        ctx.save_for_backward(token_of_row, row_of_route)
        return sum_rows(rows.contiguous(), row_of_route)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Permute.apply(grad, *ctx.saved_tensors), None, None


class _Combine(torch.autograd.Function):
    """[R, H] to [T, H]: each token's weighted sum; rows of dropped routes may be part of R."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, row_of_route: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, row_of_route)
        return sum_rows(rows.contiguous(), row_of_route, weights.contiguous())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return *_CombineBackward.apply(grad, *ctx.saved_tensors), None


class _CombineBackward(torch.autograd.Function):
    """Gradients of ``_Combine`` from grad [T, H], rows [R, H] and weights [T, K].

    The gradient of a row is w * grad, that of a weight <grad, row>. Both are linear in each input,
    so their own backward uses the same two operations.
    """

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, rows: Tensor, weights: Tensor, row_of_route: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(grad, rows, weights, row_of_route)
        return _combine_backward(grad, rows, weights, row_of_route)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, row_grads: Tensor, weight_grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, rows, weights, row_of_route = ctx.saved_tensors
        row_grads, weight_grads = row_grads.contiguous(), weight_grads.contiguous()
        grad_of_grad = sum_rows(row_grads, row_of_route, weights.contiguous())
        grad_of_grad += sum_rows(rows.contiguous(), row_of_route, weight_grads)
        return grad_of_grad, *_combine_backward(grad, row_grads, weight_grads, row_of_route), None


def _combine_backward(
    grad: Tensor, rows: Tensor, weights: Tensor, row_of_route: Tensor
) -> tuple[Tensor, Tensor]:
    return sum_rows_backward(
        grad.contiguous(), rows.contiguous(), row_of_route, weights.contiguous()
    )
