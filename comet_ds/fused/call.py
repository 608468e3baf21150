# SPDX-License-Identifier: Apache-2.0
"""What the fused path prepares once for a layer and sizes, and then calls every step.

T tokens of this rank, T_all of all ranks of the expert parallel group, K routes per token, R rows,
E experts of this rank. Rows are sorted by expert, within one by rank of the token, this one first,
then in ring order, then by token; each expert's are padded with zero rows to a multiple of the
kernels' row block.

Worked example, 2 experts, tokens routed to experts 1, 0, 1, row block 128: rows 0 to 127 are expert
0's (token 1, then padding), 128 to 255 expert 1's (tokens 0 and 2, then padding); row_of_route is
[[128], [0], [129]], expert_offsets [0, 128, 256].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from comet_ds.fused.peer.exchange import CallShape, Exchange
from comet_ds.fused.weights import ACTIVATION_CODES, ExpertWeights
from comet_ds.tuning.cost_model import CtaSplit, LayerShape


@dataclass(frozen=True)
class CallSizes:
    """What the rows of a call depend on.

    Attributes:
        num_tokens: of every rank.
        capacities: most routes of a rank's tokens one expert keeps, by rank; None for no limit.
        top_k, num_experts: routes per token, experts of all ranks.
    """

    num_tokens: tuple[int, ...]
    capacities: tuple[int, ...] | None
    top_k: int
    num_experts: int


@dataclass(frozen=True)
class PreparedCall:
    """A layer's launches for some sizes.

    Attributes:
        launches: PreparedLaunches of csrc/autograd/experts_autograd.h. It has a LayerCall for each
            direction; they differ in where tokens lie, if copy engines send them in forward.
        weights: of the layer; the launches hold addresses of its tables.
        sizes: of the call.
        max_rows: R.
        exchange: of the expert parallel group; None where all experts are local.
        shape, cta_split: what the CTA splits were chosen for, and they; None on one rank.
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
    capacities = sizes.capacities
    rows = max_rows(sizes.num_tokens, capacities, sizes.top_k, num_local, block)
    fixed = {
        "hidden": weights.hidden,
        "ffn": weights.ffn,
        "num_experts": num_local,
        "num_all_experts": sizes.num_experts,
        "top_k": sizes.top_k,
        "max_rows": rows,
        "num_tokens": list(sizes.num_tokens),
        "rank": rank,
        "num_sms": weights.num_sms,
        "is_bfloat16": weights.dtype == torch.bfloat16,
        "is_gated": weights.is_gated,
        "activation": ACTIVATION_CODES[weights.activation],
        "maps": weights.map_addresses(),
        "biases": weights.bias_addresses(),
    }
    if exchange is None:
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


def max_rows(
    num_tokens: Sequence[int],
    capacities: Sequence[int] | None,
    top_k: int,
    num_experts: int,
    row_block: int,
) -> int:
    """Return R for the tokens of some ranks: what sizes alone allow.

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
