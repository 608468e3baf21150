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
        self._weights = routing.topk_weights.detach().contiguous()
        tables = (ids, self._weights, routing.ranks, routing.kept_counts)
        addresses = (*(t.data_ptr() for t in tables), 0, 0, 0, ids.shape[0])
        sources = kernels.Sources([addresses], 0)
        kernels.plan_rows(sources, self.plan.fields(), current_stream(ids))

    def dispatch(self, tokens: Tensor) -> tuple[Tensor, None]:
        """Return [R, H]: every row its token's row of [T, H], padding zero.

        And what has to run beside the GEMM that reads them.
        """
        sources = self._sources(tokens=tokens.data_ptr())
        return dispatch_own(sources, tokens, self.plan, self.kernels), None

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
        sources = self._sources(grad_weights=self._grad_weights.data_ptr())
        sum_row_dots(sources, self.plan, row_dots, grad_rows, bias, is_bfloat16, self.kernels)

    def grad_weights(self) -> Tensor:
        """Return [T, K] fp32: what was summed, 0 for dropped routes. After ``combine``."""
        return self._grad_weights

    def _sources(self, tokens: int = 0, grad_weights: int = 0) -> object:
        num_tokens = self.plan.topk_ids.shape[0]
        return self.kernels.Sources([(0, 0, 0, 0, tokens, 0, grad_weights, num_tokens)], 0)


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
        self._tables: dict[str, Tensor] | None = {
            "topk_ids": routing.topk_ids,
            "topk_weights": routing.topk_weights.detach().contiguous(),
            "ranks": routing.ranks,
            "kept_counts": routing.kept_counts,
        }

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
        call = self._join(tokens, is_sent)
        parts, rank = self._parts, self.rank
        num_blocks = self.plan.max_rows // self.kernels.row_block
        size = self.kernels.counter_bytes // 4 + max(num_blocks, len(self.num_tokens))
        self._counters = self.plan.token_of_row.new_empty(2, size)  # for pulling, for pushing
        fields, stream = self.plan.fields(), current_stream(tokens)
        if is_forward:
            self.exchange.publish([(table, parts[name][rank]) for name, table in tables.items()])
            if not is_sent:
                self.exchange.join()  # the tokens, too, are published
            self.exchange.meet(parts["flags"], Meeting.TOKENS)
            self.kernels.plan_rows(self._sources, fields, stream)
            if is_sent:  # the first half has left the link to the tables
                self.exchange.send_half(1, tokens, call)
        published = 0 if is_forward else parts["tokens"][rank]
        rows = dispatch_own(
            self._sources, tokens, self.plan, self.kernels, self._counters, published
        )
        if not is_forward:
            self.exchange.meet(parts["flags"], Meeting.TOKENS)
        if not is_sent:
            pull = self.division.pull if is_forward else self.division.pull_grad
            return rows, self._beside(rows, pull.num_ctas, self._counters[0])
        self.exchange.join()
        self.exchange.meet(parts["flags"], Meeting.SENT_TOKENS)
        size = call.token_bytes
        self.kernels.dispatch_other_rows(self._sources, fields, rows.data_ptr(), size, stream)
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
        self.exchange.meet(self._parts["flags"], Meeting.RESULTS)
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
        at = self._parts["grad_weights"][self.rank] - memory.addresses[self.rank]
        shape = (self.num_tokens[self.rank], self.top_k)
        found = memory.block[at : at + 4 * shape[0] * shape[1]].view(torch.float32)
        return found.view(shape).clone()

    def _join(self, tokens: Tensor, is_sent: bool) -> CallShape:
        """Find the parts of the group's memory, which may have moved since the last call."""
        token_bytes = tokens.shape[1] * tokens.element_size()
        call = CallShape(self.num_tokens, self.top_k, self.num_experts, token_bytes, is_sent)
        self._parts = parts = self.exchange.parts(call)
        places = self.exchange.places(call, parts)
        places[self.rank] = tokens.data_ptr()
        names = ("topk_ids", "topk_weights", "ranks", "kept_counts")
        columns = [*(parts[name] for name in names), places, parts["slots"], parts["grad_weights"]]
        rows = list(zip(*columns, self.num_tokens, strict=True))
        self._sources = self.kernels.Sources(rows, self.rank)
        return call

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


def dispatch_own(
    sources: object,
    tokens: Tensor,
    plan: RowPlan,
    kernels: ModuleType,
    counters: Tensor | None = None,
    published: int = 0,
) -> Tensor:
    """Return [R, H] with the rows of this rank's tokens, and padding zero.

    Args:
        sources: of all ranks' tables, and of the tokens.
        tokens: [T, H], this rank's.
        plan: that of the rows.
        kernels: the compiled kernels.
        counters: to set to zero.
        published: address to copy the tokens to, or 0.
    """
    rows = tokens.new_empty(plan.max_rows, tokens.shape[1])
    row_bytes = tokens.shape[1] * tokens.element_size()
    to_zero = (0, 0) if counters is None else (counters.data_ptr(), counters.numel())
    kernels.dispatch_rows(
        sources,
        plan.fields(),
        rows.data_ptr(),
        published,
        row_bytes,
        *to_zero,
        current_stream(tokens),
    )
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
