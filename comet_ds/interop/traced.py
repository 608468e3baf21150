# SPDX-License-Identifier: Apache-2.0
"""The layer under torch.jit.trace and torch.export, without data-dependent sizes.

Every expert computes all tokens; for tokens that did not choose it the weight is zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from comet_ds._compat.torch import is_jit_tracing
from comet_ds.experts.calls import as_tensor
from comet_ds.experts.stacked import StackedExperts
from comet_ds.gate.topk_gate import TopKGate
from comet_ds.interop.kept import Kept

if TYPE_CHECKING:
    from comet_ds.layer import MOELayer

STRICT_EXPORT = "comet_ds.MoE is exported with torch.export.export(..., strict=False)"


def is_traced() -> bool:
    """Return whether torch.jit.trace or torch.export is recording the layer."""
    return is_jit_tracing() or torch.compiler.is_exporting()


def run_traced(
    layer: MOELayer, hidden_states: Tensor, used_token: Tensor | None
) -> tuple[Tensor, Kept]:
    """Compute a layer's output while its operations are recorded.

    If tokens may be dropped, the capacity becomes a constant for the recorded number of tokens, and
    a module from torch.jit.trace refuses other numbers.

    Args:
        layer: the layer.
        hidden_states: [..., H].
        used_token: see ``TopKGate.route``.

    Returns:
        The output in the input's shape, equal to the layer's up to rounding; and the loss and
        counts.

    Raises:
        RuntimeError: the layer cannot be recorded; says what to do.
    """
    gate, hidden = _checked_gate(layer), layer.hidden_size
    num_tokens = int(hidden_states.numel() // hidden) if is_jit_tracing() else -1
    capacity = None
    if gate.drop_tokens:
        x = hidden_states.reshape(num_tokens, hidden)
        capacity = gate.capacity(int(x.shape[0]))
    else:
        x = hidden_states.reshape(-1, hidden)
    routing = gate.route_by_torch(x, capacity, used_token)
    experts = layer.experts
    with experts.unbound() if isinstance(experts, StackedExperts) else nullcontext():
        output = _all_experts(x, routing.topk_ids, routing.topk_weights, layer.expert_modules())
    return output.reshape(hidden_states.shape), Kept(routing.l_aux, routing.exp_counts)


def _checked_gate(layer: MOELayer) -> TopKGate:
    """Return the gate of a layer that can be recorded."""
    if layer.ep_size > 1:
        raise RuntimeError(
            f"a layer with ep_size {layer.ep_size} cannot be traced or exported, because its "
            "experts are on other ranks: build the model with ep_size 1 and load all experts"
        )
    found = layer.overrides
    if (what := found.layer or found.gate or found.experts) is not None:
        raise RuntimeError(f"the layer cannot be traced or exported: {what}; remove it first")
    assert isinstance(layer.gate, TopKGate), "another gate is named in found.gate"
    return layer.gate


def _all_experts(
    x: Tensor, topk_ids: Tensor, topk_weights: Tensor, experts: Sequence[nn.Module]
) -> Tensor:
    inputs = x.view(1, 1, -1, x.shape[1])
    total = dtype = None
    for index, expert in enumerate(experts):
        rows = as_tensor(expert(inputs), inputs, "an expert", expert)[0, 0]
        weights = (topk_weights * (topk_ids == index)).sum(dim=1, keepdim=True)
        share = weights * rows.to(torch.promote_types(rows.dtype, weights.dtype))
        total, dtype = share if total is None else total + share, rows.dtype
    assert total is not None, "a layer has at least one expert"
    return total.to(dtype)
