# SPDX-License-Identifier: Apache-2.0
"""Bringing tokens to the rows of their experts and results back: on one rank, and between ranks.

T tokens of this rank, T_all of all ranks of the expert parallel group, K routes per token, H
hidden, R rows, E experts of this rank. A dispatcher serves one forward and its backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from comet_ds.exchange import CallShape, Exchange, ExposureMeter, Meeting
from comet_ds.expert_gemm import ORDERS, ExpertRows, Pass
from comet_ds.gate import Routing
from comet_ds.kernels import current_stream
from comet_ds.refine import GEMMS, Trial
from comet_ds.row_ops import DTYPE_CODES, sum_rows

# What all ranks have to know of a rank's routing: Source in csrc/moe/dispatch.h.
TABLES = ("topk_ids", "topk_weights", "ranks", "kept_counts")


@dataclass(frozen=True)
class RowPlan(ExpertRows):
    """Where the routes to this rank's experts lie as rows.

    Rows are sorted by expert, within one by rank of the token, this one first, then in ring order,
    then by token; each expert's are padded to a multiple of the kernels' row block. R bounds their
    number whatever the routing.

    Attributes:
        row_of_route: [T_all, K] int64; -1 = dropped, or another rank's.
        token_of_row: [R] int32; among T_all, -1 = padding.
        row_weights: [R] fp32; routing weight, 0 in padding.
        remote_begin: [N, W] int32; position of each ``block_order`` before which no block has rows
            of ranks at this distance, in ring order, or farther.
        remote_rows: [R / row_block] int32; rows of other ranks' tokens in a block.
        topk_ids: [T_all, K] int64; expert of each route, of all ranks' experts.
        route_weights: [T_all, K] fp32; routing weight of routes that have a row.
        peers: [T_all] int32; ranks but its own that a token goes to, a bit each.
        num_split: of each ``block_order``, how many experts it splits: the blocks of these which
            have this rank's tokens only come first, the rest last, by distance where all are split.

    Worked example, 2 experts, tokens routed to experts 1, 0, 1, row block 128: rows 0 to 127 are
    expert 0's (token 1, then padding), 128 to 255 expert 1's (tokens 0 and 2, then padding);
    row_of_route is [[128], [0], [129]], expert_offsets [0, 128, 256].
    """

    row_of_route: Tensor
    token_of_row: Tensor
    row_weights: Tensor
    remote_begin: Tensor
    remote_rows: Tensor
    topk_ids: Tensor
    route_weights: Tensor
    peers: Tensor
    num_split: tuple[int, ...]

    @classmethod
    def empty(
        cls,
        topk_ids: Tensor,
        num_experts: int,
        max_rows: int,
        row_block: int,
        num_ranks: int = 1,
        num_split: tuple[int, ...] = (0,),
    ) -> RowPlan:
        """Allocate a plan."""
        device, orders = topk_ids.device, (len(num_split), max_rows // row_block)

        def integers(*size: int) -> Tensor:
            return torch.empty(size, dtype=torch.int32, device=device)

        return cls(
            integers(num_experts + 1),
            integers(*orders),
            integers(*orders),
            max_rows,
            torch.empty_like(topk_ids),
            integers(max_rows),
            torch.empty(max_rows, dtype=torch.float32, device=device),
            integers(len(num_split), num_ranks),
            integers(max_rows // row_block),
            topk_ids,
            torch.empty(topk_ids.shape, dtype=torch.float32, device=device),
            integers(topk_ids.shape[0]),
            num_split,
        )

    def fields(self) -> tuple[int, ...]:
        """Return PlanFields of csrc/bindings.cpp."""
        tensors = (
            self.row_of_route,
            self.token_of_row,
            self.row_weights,
            self.expert_offsets,
            self.block_order,
            self.expert_order,
            self.remote_begin,
            self.remote_rows,
            self.topk_ids,
            self.route_weights,
            self.peers,
        )
        num_experts = self.expert_offsets.numel() - 1
        addresses = (t.data_ptr() for t in tensors)
        sizes = (*self.row_of_route.shape, num_experts, self.max_rows)
        return *addresses, *sizes, *self.num_split


def max_rows(
    num_tokens: Sequence[int],
    capacities: Sequence[int] | None,
    top_k: int,
    num_experts: int,
    row_block: int,
) -> int:
    """Return R for the tokens of some ranks: what shapes alone allow.

    Args:
        num_tokens: of every rank.
        capacities: most routes of a rank's tokens one expert keeps, by rank; None for no limit.
    """
    total = sum(num_tokens)
    # A token goes to an expert once at most.
    rows = total * min(top_k, num_experts) + num_experts * (row_block - 1)
    if capacities is not None:
        per_expert = sum(map(min, capacities, num_tokens))
        rows = min(rows, num_experts * -(-per_expert // row_block) * row_block)
    return max(rows // row_block, 1) * row_block


class LocalDispatcher:
    """All experts are on this rank.

    Args:
        routing: from the CUDA gate (with ranks).
        kernels: the compiled kernels.

    Attributes:
        plan: where rows lie.
        has_peers: whether other ranks wait for this one's calls.
        trial: of the division points; None where there are none.
    """

    has_peers = False
    trial: Trial | None = None

    def __init__(self, routing: Routing, kernels: ModuleType) -> None:
        self.kernels = kernels
        ids = routing.topk_ids
        capacities = None if routing.capacity is None else [routing.capacity]
        num_experts = routing.exp_counts.numel()
        shape = (ids.shape[1], num_experts, kernels.row_block)
        self.plan = RowPlan.empty(
            ids, num_experts, max_rows([ids.shape[0]], capacities, *shape), kernels.row_block
        )
        self._tables: dict[str, Tensor] | None = routing_tables(routing)
        self._weights = self._tables["topk_weights"]

    def dispatch(self, tokens: Tensor) -> tuple[Tensor, None]:
        """Return [R, H]: every row its token's row of [T, H], padding zero. The first call plans.

        And what has to run beside the GEMM that reads them.
        """
        tables, self._tables = self._tables, None
        sources = self._sources(tables or {}, tokens=tokens.data_ptr())
        own = (sources, tokens, self.plan, self.kernels)
        return dispatch_own(*own, is_planned=tables is None), None

    def push(self, rows: Tensor, *, is_weighted: bool) -> None:
        """Return what has to run beside a GEMM before ``combine``, None if nothing.

        Args:
            rows: [R, H]; what ``combine`` sums. Weighted rows are those which the GEMM writes,
                others are there before it.
            is_weighted: as in ``combine``.
        """

    def combine(self, rows: Tensor, *, is_weighted: bool, is_pushed: bool = False) -> Tensor:
        """Return [T, H]: the sum of every token's rows, times the routing weight or not.

        Args:
            rows: [R, H].
            is_weighted: whether to multiply by the routing weight.
            is_pushed: whether what ``push`` returned has run.
        """
        return sum_rows(rows, self.plan.row_of_route, self._weights if is_weighted else None)

    def send_grad_weights(
        self, row_dots: Tensor, grad_rows: Tensor, bias: int, is_bfloat16: bool
    ) -> None:
        """Sum the gradients of the routing weights.

        Args:
            row_dots: [tiles, R] fp32; its sum over tiles is <gradient, expert output> of a row
                without bias.
            grad_rows: [R, H]; the dispatched gradient.
            bias: address of the table of down's biases, or 0.
            is_bfloat16: dtype of grad_rows and biases, else fp16.
        """
        self._grad_weights = self.plan.row_weights.new_empty(self.plan.topk_ids.shape)
        sources = self._sources({}, grad_weights=self._grad_weights.data_ptr())
        sum_row_dots(sources, self.plan, row_dots, grad_rows, bias, is_bfloat16, self.kernels)

    def grad_weights(self) -> Tensor:
        """Return [T, K] fp32: what was summed, 0 for dropped routes. After ``combine``."""
        return self._grad_weights

    def _sources(self, tables: dict[str, Tensor], tokens: int = 0, grad_weights: int = 0) -> object:
        found = (tables[name].data_ptr() if name in tables else 0 for name in TABLES)
        num_tokens = self.plan.topk_ids.shape[0]
        return self.kernels.Sources([(*found, tokens, 0, grad_weights, num_tokens)], 0)


class PeerDispatcher:
    """Experts are spread over the ranks of a group. The same interface; every call of ``dispatch``
    and ``combine`` meets the other ranks, so all ranks make them in the same order.

    Args:
        routing: from the CUDA gate (with ranks), ids of all ranks' experts.
        exchange: the group's.
        num_tokens: of every rank.
        capacities: most routes of a rank's tokens one expert keeps, by rank; None for no limit.
        trial: what goes on beside the layer's GEMMs.
        num_sms: of the GPU.
        meter: of what communication takes from computation, if anyone asks.
    """

    has_peers = True

    def __init__(
        self,
        routing: Routing,
        exchange: Exchange,
        num_tokens: tuple[int, ...],
        capacities: Sequence[int] | None,
        trial: Trial,
        num_sms: int,
        meter: ExposureMeter | None = None,
    ) -> None:
        self.exchange, self.kernels, self.num_sms = exchange, exchange.kernels, num_sms
        self.num_tokens, self.rank = num_tokens, exchange.memory.rank
        self.top_k, self.num_experts = routing.topk_ids.shape[1], routing.exp_counts.numel()
        num_local = self.num_experts // len(num_tokens)
        ids = routing.topk_ids.new_empty(sum(num_tokens), self.top_k)
        block = self.kernels.row_block
        rows = max_rows(num_tokens, capacities, self.top_k, num_local, block)
        self.trial, self.division, self._meter = trial, trial.division, meter
        num_split = (0, *(getattr(self.division, GEMMS[gemm]).num_split for gemm in ORDERS))
        self.plan = RowPlan.empty(ids, num_local, rows, block, len(num_tokens), num_split)
        self._tables: dict[str, Tensor] | None = routing_tables(routing)

    def dispatch(self, tokens: Tensor) -> tuple[Tensor, object]:
        """Return [R, H]: rows of all ranks' tokens, padding zero. The first call also plans.

        Other ranks' rows are there too where tokens are sent, else they come beside the GEMM that
        reads them.
        """
        self.exchange.enter()
        tables, self._tables = self._tables, None
        is_forward = tables is not None
        # A graph would add to the meter's memory long after its end.
        is_metered = self._meter is not None and not torch.cuda.is_current_stream_capturing()
        self.exchange.exposure = self._meter.begin(int(not is_forward)) if is_metered else 0
        is_sent = is_forward and self.division.is_sent
        self._join(tokens, tables, is_sent)
        num_blocks = self.plan.max_rows // self.kernels.row_block
        size = self.kernels.counter_bytes // 4 + max(num_blocks, len(self.num_tokens))
        self._counters = self.plan.token_of_row.new_empty(2, size)  # for pulling, for pushing
        own = (self._sources, tokens, self.plan, self.kernels, self._counters)
        if not is_forward:
            published = self._parts.addresses["tokens"][self.rank]
            rows = dispatch_own(*own, is_planned=True, published=published)
            self._meet(Meeting.TOKENS)
            return rows, self._beside(rows, self.division.pull_grad.num_ctas, self._counters[0])
        self.exchange.send_tables(tables, self._parts)
        if not is_sent:
            self.exchange.join()  # the tokens, too, are published
        self._meet(Meeting.TOKENS)
        if is_sent:  # the first half has left the link to the tables
            self.exchange.send_half(1, tokens, self._parts.call)
        rows = dispatch_own(*own, is_planned=False)
        if not is_sent:
            return rows, self._beside(rows, self.division.pull.num_ctas, self._counters[0])
        self.exchange.join()
        self._meet(Meeting.SENT_TOKENS)
        arguments = (self.plan.fields(), rows.data_ptr(), self._parts.call.token_bytes)
        self.kernels.dispatch_other_rows(self._sources, *arguments, current_stream(rows))
        return rows, None

    def push(self, rows: Tensor, *, is_weighted: bool) -> object:
        """As ``LocalDispatcher.push``."""
        if not is_weighted:
            return self._beside(rows, self.division.push_grad.num_ctas, self._counters[1])
        remote_begin = self.plan.remote_begin[ORDERS[Pass.DOWN]].data_ptr()
        return self._beside(rows, self.division.push.num_ctas, self._counters[1], remote_begin)

    def combine(self, rows: Tensor, *, is_weighted: bool, is_pushed: bool = False) -> Tensor:
        """As ``LocalDispatcher.combine``, with the rows on all ranks."""
        stream = current_stream(rows)
        if not is_pushed:
            push = self._beside(rows, self.num_sms, self._counters[1])
            self.kernels.push_sums(push, is_weighted, self.num_sms, stream)
        self._meet(Meeting.RESULTS)
        output = rows.new_empty(self.num_tokens[self.rank], rows.shape[1])
        call = (*self._call(rows), rows.data_ptr(), is_weighted, output.data_ptr())
        self.kernels.sum_partials(*call, stream)
        return output

    def send_grad_weights(
        self, row_dots: Tensor, grad_rows: Tensor, bias: int, is_bfloat16: bool
    ) -> None:
        """Sum the gradients of the routing weights into the memory of the tokens' ranks."""
        sources = self._sources
        sum_row_dots(sources, self.plan, row_dots, grad_rows, bias, is_bfloat16, self.kernels)

    def grad_weights(self) -> Tensor:
        """Return [T, K] fp32: what all ranks have summed, 0 for dropped routes."""
        memory = self.exchange.memory
        at = self._parts.addresses["grad_weights"][self.rank] - memory.addresses[self.rank]
        shape = (self.num_tokens[self.rank], self.top_k)
        found = memory.block[at : at + 4 * shape[0] * shape[1]].view(torch.float32)
        return found.view(shape).clone()

    def _join(self, tokens: Tensor, tables: dict[str, Tensor] | None, is_sent: bool) -> None:
        """Find the parts of the group's memory, which may have moved since the last call."""
        token_bytes = tokens.shape[1] * tokens.element_size()
        call = CallShape(self.num_tokens, self.top_k, self.num_experts, token_bytes, is_sent)
        self._parts = parts = self.exchange.parts(call)
        own = {**(tables or {}), "tokens": tokens}
        columns = []
        for name in (*TABLES, "tokens"):
            column = parts.places(name, self.rank)
            column[self.rank] = own[name].data_ptr() if name in own else 0
            columns.append(column)
        columns += [parts.addresses["slots"], parts.addresses["grad_weights"]]
        rows = list(zip(*columns, self.num_tokens, strict=True))
        self._sources = self.kernels.Sources(rows, self.rank)

    def _meet(self, what: Meeting) -> None:
        self.exchange.meet(self._parts.addresses["flags"], what)

    def _beside(
        self, rows: Tensor, num_ctas: int, counters: Tensor, remote_begin: int = 0
    ) -> object:
        """Return ``Communication`` of csrc/moe/exchange.h for one launch.

        Args:
            rows: [R, H]; pulled into, or pushed from.
            num_ctas: CTAs set apart.
            counters: ``Counters`` of csrc/moe/exchange.h.
            remote_begin: address of the plan's, of the order of the GEMM that writes the rows.
        """
        return self.kernels.Communication(
            *self._call(rows),
            rows.data_ptr(),
            num_ctas,
            remote_begin,
            counters.data_ptr(),
            self.exchange.timeout_ns,
            self.exchange.late.data_ptr(),
            self.exchange.exposure,
        )

    def _call(self, rows: Tensor) -> tuple[object, ...]:
        """Return the arguments the kernels of csrc/moe/exchange.h have in common."""
        return self._sources, self.plan.fields(), rows.shape[1], DTYPE_CODES[rows.dtype]


def routing_tables(routing: Routing) -> dict[str, Tensor]:
    """Return the ``TABLES`` of this rank."""
    found = {name: getattr(routing, name) for name in TABLES}
    return {**found, "topk_weights": routing.topk_weights.detach().contiguous()}


def dispatch_own(
    sources: object,
    tokens: Tensor,
    plan: RowPlan,
    kernels: ModuleType,
    counters: Tensor | None = None,
    *,
    is_planned: bool,
    published: int = 0,
) -> Tensor:
    """Return [R, H] with the rows of this rank's tokens, and padding zero.

    Args:
        sources: of all ranks' tokens, and of their tables for a plan.
        tokens: [T, H], this rank's.
        plan: that of the rows.
        kernels: the compiled kernels.
        counters: to set to zero.
        is_planned: whether the plan is there; else it is written.
        published: address to copy the tokens to, or 0; of a plan that is there.
    """
    rows = tokens.new_empty(plan.max_rows, tokens.shape[1])
    to_zero = (0, 0) if counters is None else (counters.data_ptr(), counters.numel())
    row_bytes = tokens.shape[1] * tokens.element_size()
    arguments = (rows.data_ptr(), row_bytes, *to_zero, current_stream(tokens))
    if is_planned:
        kernels.dispatch_rows(sources, plan.fields(), published, *arguments)
    else:
        kernels.plan_and_dispatch(sources, plan.fields(), *arguments)
    return rows


def sum_row_dots(
    sources: object,
    plan: RowPlan,
    row_dots: Tensor,
    grad_rows: Tensor,
    bias: int,
    is_bfloat16: bool,
    kernels: ModuleType,
) -> None:
    """Launch the kernel of this name; arguments as in ``LocalDispatcher.send_grad_weights``."""
    kernels.sum_row_dots(
        sources,
        plan.fields(),
        row_dots.data_ptr(),
        row_dots.shape[0],
        grad_rows.data_ptr(),
        bias,
        grad_rows.shape[1],
        is_bfloat16,
        current_stream(grad_rows),
    )
