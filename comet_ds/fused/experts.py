# SPDX-License-Identifier: Apache-2.0
"""The fused path: a rank's experts on the kernels of csrc, forward and backward.

Here it is decided whether the experts can take it, and what a call needs is prepared. What runs is
the node of autograd's graph in csrc/autograd/experts_autograd.cpp, on the launches of
csrc/host/layer_call.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from comet_ds.experts.mlp import ExpertMLP, RecognisedExperts
from comet_ds.fused.call import CallSizes, PreparedCall, layer_shape, prepare_call
from comet_ds.fused.peer.exchange import Exchange, ExposureMeter
from comet_ds.fused.weights import ALIGNMENT_BYTES, ExpertWeights, why_not_addressable
from comet_ds.gate.routing import Routing
from comet_ds.gate.topk_gate import TopKGate
from comet_ds.kernels import load_kernels, why_no_kernels
from comet_ds.ranks.gradients import BackwardNeeds
from comet_ds.tuning.cost_model import CtaSplit, LayerShape
from comet_ds.tuning.online import Trial

DTYPES = (torch.bfloat16, torch.float16)
MAX_PREPARED = 64  # sizes of a layer whose launches are kept


@dataclass(frozen=True)
class FusedCall:
    """One forward of a layer and its backward.

    Attributes:
        prepared: the launches.
        trial: the CTA splits to measure, if any are.
        side_stream: address of the stream of copies that run meanwhile, 0 on one rank.
        needs: gradients that any rank needs; None on one rank.
    """

    prepared: PreparedCall
    trial: Trial | None = None
    side_stream: int = 0
    needs: BackwardNeeds | None = None


class FusedExperts:
    """The local experts of one layer on the fused path.

    Attributes:
        experts: the layer's modules; looked at again on every call.
        weights: their matrices; another object when they have changed, None before the first call.
        shape, cta_split: layer shape and CTA split of the last forward; None on a single rank.
        meter: of what communication takes from computation, while anyone asks.
    """

    def __init__(self, experts: Sequence[nn.Module]) -> None:
        self.experts = experts
        self._recognised = RecognisedExperts()
        self.weights: ExpertWeights | None = None
        self._prepared: dict[Any, PreparedCall] = {}
        self.shape: LayerShape | None = None
        self.cta_split: CtaSplit | None = None
        self.meter: ExposureMeter | None = None

    def __reduce__(self) -> tuple[type, tuple]:
        """Make tables anew in copies."""
        return FusedExperts, (self.experts,)

    def why_not(self, x: Tensor) -> str | None:
        """Return why the experts cannot take the fused path with this input, None where they can.

        Looks at the experts: cheap as long as they have not changed.
        """
        if x.device.type != "cuda":
            return f"it needs a CUDA device, not {x.device.type}"
        if x.dtype not in DTYPES:
            return f"it needs bfloat16 or float16, not {x.dtype}"
        if torch.is_autocast_enabled(x.device.type):
            return "it does not know autocast"
        kernels = load_kernels(x.device)
        if kernels is None:
            return f"it has no kernels: {why_no_kernels()}"
        mlps = self._recognised.find(self.experts, kernels.ModuleWatch)
        if isinstance(mlps, str):
            return mlps
        if not kernels.can_plan(len(mlps), 1):
            return f"a plan has no room for {len(mlps)} experts"
        if not self._fits(mlps, x):
            self.weights = None
            self._prepared.clear()
            if reason := why_not_addressable(mlps, x):
                return reason
            self.weights = ExpertWeights(mlps, kernels)
        return None

    def _fits(self, mlps: Sequence[ExpertMLP], x: Tensor) -> bool:
        """Whether the tables made last are right for these experts and this input."""
        weights = self.weights
        return (
            weights is not None
            and weights.mlps == mlps  # train and eval mode have lists of their own, often equal
            and (weights.dtype, weights.device) == (x.dtype, x.device)
            and weights.is_current()
        )

    def describe(self) -> str:
        """Return a phrase for the log line."""
        stacked = "stacked " if self.weights.weights["up"].is_stacked else ""
        return f"{stacked}{self.weights.mlps[0].describe()} experts"

    def begin(
        self,
        x: Tensor,
        exchange: Exchange | None,
        num_tokens: tuple[int, ...],
        gate: TopKGate,
        needs: BackwardNeeds | None = None,
    ) -> tuple[Tensor, FusedCall]:
        """Send the input on its way to the other ranks while the gate runs.

        Args:
            x: [T, H], what ``why_not`` has accepted.
            exchange: of the expert parallel group, whose ranks all make this call; None where all
                experts are local.
            num_tokens: T of every rank of the group.
            gate: the layer's.
            needs: gradients that any of the ranks needs; None where all experts are local.

        Returns:
            The input as ``run`` reads it, and what ``run`` is to be given.
        """
        x = _aligned(x)
        capacities = None
        if gate.drop_tokens:
            by_count = {count: gate.capacity(count) for count in set(num_tokens)}
            capacities = tuple(by_count[count] for count in num_tokens)
        sizes = CallSizes(num_tokens, capacities, gate.k, gate.wg.weight.shape[0])
        if exchange is None:
            return x, FusedCall(self._prepare(sizes))
        trial = None
        if exchange.tuner is not None:
            shape = layer_shape(self.weights, sizes, exchange.memory.rank)
            trial = exchange.trial(shape, needs.has_any and needs.absent is None)
        prepared = self._prepare(sizes, exchange, trial)
        self.shape, self.cta_split = prepared.shape, prepared.cta_split
        side_stream = exchange.streams.enter()
        prepared.launches.forward.begin(tokens=x, side_stream=side_stream)
        is_measured = trial is not None and trial.samples
        return x, FusedCall(prepared, trial if is_measured else None, side_stream, needs)

    def _prepare(
        self, sizes: CallSizes, exchange: Exchange | None = None, trial: Trial | None = None
    ) -> PreparedCall:
        """Return the launches of some sizes, remembered as long as nothing moves."""
        if exchange is None:
            key, cta_split = sizes, None
        else:
            cta_split = trial.cta_split if trial is not None else exchange.cta_split
            key = exchange, sizes, cta_split, exchange.generation
        if (found := self._prepared.get(key)) is None:
            if exchange is not None and cta_split is None:
                shape = layer_shape(self.weights, sizes, exchange.memory.rank)
                cta_split = exchange.trial(shape, has_backward=True).cta_split
            if len(self._prepared) >= MAX_PREPARED:
                self._prepared.clear()
            found = prepare_call(self.weights, sizes, exchange, cta_split)
            if exchange is not None:  # the memory may have grown for it
                key = (*key[:3], exchange.generation)
            self._prepared[key] = found
        return found

    def _has_backward(self, *inputs: Tensor) -> bool:
        needed = (*inputs, *self.weights.parameters)
        return torch.is_grad_enabled() and any(t.requires_grad for t in needed)

    def run(self, routing: Routing, call: FusedCall) -> Tensor:
        """Compute the layer's output for this rank's tokens.

        Args:
            routing: from the CUDA gate, of what ``begin`` has returned.
            call: what ``begin`` has returned.

        Returns:
            [T, H] in the tokens' dtype. Gradients for them, the routing weights and every expert
            parameter; the same input gives the same bits.
        """
        prepared, needs, weights = call.prepared, call.needs, routing.topk_weights
        if needs is not None and needs.has_any and not self._has_backward(routing.tokens, weights):
            # Another rank's backward needs this one's: it is attached, whatever is needed here.
            weights = weights.detach().requires_grad_(torch.is_grad_enabled())
        return prepared.weights.kernels.run_experts(
            x=routing.tokens,
            topk_weights=weights,
            topk_ids=routing.topk_ids,
            slot_in_expert=routing.slot_in_expert,
            kept_counts=routing.kept_counts,
            launches=prepared.launches,
            prepared=prepared,
            trial=call.trial,
            meter=self.meter,
            needs=needs if needs is not None and needs.absent is not None else None,
            side_stream=call.side_stream,
        )


def _aligned(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor whose rows can be read 16 bytes at a time."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT_BYTES else tensor
