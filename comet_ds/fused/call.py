# SPDX-License-Identifier: Apache-2.0
"""One forward of the fused path, and the launches it shares with others of the same sizes.

A ``FusedCall`` begins before the gate, so that tokens travel while the gate runs, and runs after
it. Its autograd node is in csrc/autograd/experts_autograd.cpp, which launches the kernels through
csrc/host/layer_call.cpp. The launches are prepared once for a layer and sizes (``prepare_call``).

T tokens of this rank, T_all of all ranks of the expert parallel group, K routes per token, R rows,
E experts of this rank. Rows are sorted by expert, within one by rank of the token, this one first,
then in ring order, then by token; each expert's are padded with zero rows to a multiple of the
kernels' row block.

Worked example, 2 experts, tokens routed to experts 1, 0, 1, row block 128: rows 0 to 127 are expert
0's (token 1, then padding), 128 to 255 expert 1's (tokens 0 and 2, then padding); row_of_route is
[[128], [0], [129]], expert_offsets [0, 128, 256].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from comet_ds.fused.peer.exchange import Exchange
from comet_ds.fused.peer.exposure import ExposureMeter
from comet_ds.fused.peer.layout import CallShape
from comet_ds.fused.weights import ACTIVATION_CODES, ALIGNMENT_BYTES, ExpertWeights
from comet_ds.gate.routing import Routing
from comet_ds.ranks.gradients import BackwardNeeds
from comet_ds.tuning.cost_model import CtaSplit, LayerShape
from comet_ds.tuning.online import Trial


@dataclass(frozen=True)
class CallSizes:
    """What the rows of a call depend on.

    Attributes:
        num_tokens: of every rank.
        capacities: most routes of a rank's tokens one expert keeps, by rank; None for no limit.
        top_k, num_experts: routes per token, experts of all ranks.
        max_rows_factor: bound of a rank's rows where nothing is dropped, see ``CometConfig``.
    """

    num_tokens: tuple[int, ...]
    capacities: tuple[int, ...] | None
    top_k: int
    num_experts: int
    max_rows_factor: float | None = None

    @property
    def counts_rows(self) -> bool:
        """Whether memory is allocated for the rows a rank has, which the host has to read.

        Otherwise it is allocated for the most rows that sizes allow. On a single rank without
        dropping that is hardly more, because all routes stay on it.
        """
        no_bound = self.capacities is None and self.max_rows_factor is None
        return no_bound and len(self.num_tokens) > 1


@dataclass(frozen=True)
class PreparedCall:
    """A layer's launches for some sizes.

    Attributes:
        launches: PreparedLaunches of csrc/autograd/experts_autograd.h. It has a LayerCall for each
            direction; they differ in where tokens lie, if copy engines send them in forward.
        weights: of the layer; the launches hold addresses of its tables.
        sizes: of the call.
        max_rows: most rows, R, of a forward.
        exchange: of the expert parallel group; None where all experts are local.
        shape: what the CTA split was chosen for; None on a single rank.
        cta_split: the choice; None on a single rank.
    """

    launches: Any
    weights: ExpertWeights
    sizes: CallSizes
    max_rows: int
    exchange: Exchange | None = None
    shape: LayerShape | None = None
    cta_split: CtaSplit | None = None

    def current(self) -> PreparedCall:
        """Return the same call with addresses that hold, should the memory have moved since."""
        if self.exchange is None or self.launches.generation == self.exchange.generation:
            return self
        return prepare_call(self.weights, self.sizes, self.exchange, self.cta_split)


def prepare_call(
    weights: ExpertWeights,
    sizes: CallSizes,
    exchange: Exchange | None = None,
    cta_split: CtaSplit | None = None,
) -> PreparedCall:
    """Prepare the launches of a layer. Collective where the group's memory has to grow."""
    rank = exchange.memory.rank if exchange is not None else 0
    num_local, block = weights.num_experts, weights.kernels.row_block
    rows = max_rows(sizes, num_local, block)
    fixed = {
        "hidden": weights.hidden,
        "ffn": weights.ffn,
        "num_experts": num_local,
        "num_all_experts": sizes.num_experts,
        "top_k": sizes.top_k,
        "max_rows": rows,
        "counts_rows": sizes.counts_rows,
        "num_tokens": list(sizes.num_tokens),
        "rank": rank,
        "num_sms": weights.num_sms,
        "is_bfloat16": weights.dtype == torch.bfloat16,
        "is_gated": weights.is_gated,
        "activation": ACTIVATION_CODES[weights.activation],
        "maps": weights.map_addresses(),
        "biases": weights.bias_addresses(),
    }
    if exchange is None or cta_split is None:
        assert exchange is cta_split is None, "other ranks need a CTA split"
        call = weights.kernels.LayerCall(**fixed)
        return PreparedCall(_launches(weights, [call]), weights, sizes, rows)
    fixed |= {name: list(point[:2]) for name, point in cta_split._asdict().items()}
    token_bytes = weights.hidden * weights.dtype.itemsize
    call_shapes = [
        CallShape(sizes.num_tokens, sizes.top_k, sizes.num_experts, token_bytes, is_pushed)
        for is_pushed in dict.fromkeys((cta_split.is_pushed, False))
    ]
    for call_shape in call_shapes:
        exchange.parts(call_shape)  # the memory grows before any address is taken
    calls = [
        weights.kernels.LayerCall(**fixed, **exchange.places(call_shape))
        for call_shape in call_shapes
    ]
    return PreparedCall(
        _launches(weights, calls, exchange.streams),
        weights,
        sizes,
        rows,
        exchange,
        layer_shape(weights, sizes, rank),
        cta_split,
    )


def _launches(weights: ExpertWeights, calls: Sequence[Any], streams: Any = None) -> Any:
    """Return launches whose forward is the first of some LayerCalls, whose backward is the last."""
    directions = {"forward": calls[0], "backward": calls[-1]}
    return weights.kernels.PreparedLaunches(**directions, parameters=weights.handles, peers=streams)


def layer_shape(weights: ExpertWeights, sizes: CallSizes, rank: int) -> LayerShape:
    """Return what the CTA splits of a layer depend on."""
    return LayerShape(
        sizes.num_tokens,
        rank,
        sizes.top_k,
        sizes.num_experts,
        1 + weights.is_gated,
        weights.hidden,
        weights.ffn,
        str(weights.dtype).removeprefix("torch."),
        weights.num_sms,
    )


def max_rows(sizes: CallSizes, num_local_experts: int, row_block: int) -> int:
    """Return the most rows that one rank's experts can have, a multiple of ``row_block``.

    Worked example, two ranks of 100 tokens, top-1, one expert a rank, row block 128: 200 rows
    without dropping, so 256; 50 with a capacity of 25 on each rank, so 128.
    """
    total = sum(sizes.num_tokens)
    padding = num_local_experts * (row_block - 1)
    # A token goes to an expert once at most.
    rows = total * min(sizes.top_k, num_local_experts)
    if sizes.max_rows_factor is not None:
        even_share = total * sizes.top_k / len(sizes.num_tokens)
        rows = min(rows, math.ceil(sizes.max_rows_factor * even_share))
    rows += padding
    if sizes.capacities is not None:
        per_expert = sum(map(min, sizes.capacities, sizes.num_tokens))
        rows = min(rows, num_local_experts * -(-per_expert // row_block) * row_block)
    return max(rows // row_block, 1) * row_block


class FusedCall:
    """One forward of a layer and its backward: ``begin``, then the gate, then ``run``.

    Args:
        prepared: the launches.
        trial: CTA splits to measure, if any.
        needs: gradients that any rank needs; None on a single rank.
        meter: measures exposed communication, if anyone asks.
    """

    __slots__ = ("_meter", "_needs", "_prepared", "_side_stream", "_trial")

    def __init__(
        self,
        prepared: PreparedCall,
        trial: Trial | None = None,
        needs: BackwardNeeds | None = None,
        meter: ExposureMeter | None = None,
    ) -> None:
        self._prepared, self._trial, self._needs, self._meter = prepared, trial, needs, meter
        self._side_stream = 0

    def begin(self, x: Tensor) -> Tensor:
        """Start bringing the tokens to the other ranks; return the input as the gate is to see it.

        Args:
            x: [T, H], the dtype of the weights.
        """
        x = _aligned(x)
        exchange = self._prepared.exchange
        if exchange is not None:
            self._side_stream = exchange.streams.enter()
            self._prepared.launches.forward.begin(tokens=x, side_stream=self._side_stream)
        return x

    def run(self, routing: Routing) -> Tensor:
        """Compute the layer's output for this rank's tokens.

        Waits on the host for the number of rows where ``CallSizes.counts_rows``.

        Args:
            routing: from the CUDA gate, for what ``begin`` has returned.

        Returns:
            [T, H] in the tokens' dtype. Gradients for them, the routing weights and every expert
            parameter; the same input gives the same bits.
        """
        prepared, needs, weights = self._prepared, self._needs, routing.topk_weights
        tokens, slots, kept_counts = routing.tokens, routing.slot_in_expert, routing.kept_counts
        assert tokens is not None and slots is not None and kept_counts is not None, (
            "the routing must be the CUDA gate's"
        )
        if needs is not None and needs.has_any and not self._has_backward(tokens, weights):
            # Another rank's backward needs this one's, whatever is needed here.
            weights = weights.detach().requires_grad_(torch.is_grad_enabled())
        return prepared.weights.kernels.run_experts(
            x=tokens,
            topk_weights=weights,
            topk_ids=routing.topk_ids,
            slot_in_expert=slots,
            kept_counts=kept_counts,
            launches=prepared.launches,
            prepared=prepared,
            trial=self._trial,
            meter=self._meter,
            needs=needs if needs is not None and needs.absent is not None else None,
            side_stream=self._side_stream,
        )

    def _has_backward(self, *inputs: Tensor) -> bool:
        needed = (*inputs, *self._prepared.weights.parameters)
        return torch.is_grad_enabled() and any(t.requires_grad for t in needed)


def _aligned(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor whose rows can be read 16 bytes at a time."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT_BYTES else tensor


_ITEM_DTYPES = {
    "topk_ids": torch.int64,
    "row_of_route": torch.int64,
    "route_weights": torch.float32,
    "row_weights": torch.float32,
}


def plan_of(call: Any, workspace: Tensor) -> dict[str, Tensor]:
    """Return the parts of a workspace by name, as views: RowPlan of csrc/rows/dispatch.h.

    Args:
        call: ``PreparedCall.launches.forward``.
        workspace: [call.workspace_bytes] uint8, what its forward has written.
    """
    found = {}
    for name, offset, item_bytes, shape in call.workspace_parts:
        num_bytes = item_bytes * torch.Size(shape).numel()
        part = workspace[offset : offset + num_bytes]
        found[name] = part.view(_ITEM_DTYPES.get(name, torch.int32)).view(shape)
    return found
