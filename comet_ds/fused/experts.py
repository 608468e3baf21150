# SPDX-License-Identifier: Apache-2.0
"""The local experts of a layer on the fused path.

``recognise`` looks at the experts and the input: it returns the experts' weights as the kernels
read them, or a ``Refusal``. ``prepare`` returns a ``FusedCall``, which runs one forward. The
launches of a call depend on sizes alone and are remembered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from comet_ds.config import CONFIG_KEY
from comet_ds.experts.mlp import ExpertMLP, RecognisedExperts
from comet_ds.fused.call import CallSizes, FusedCall, PreparedCall, layer_shape, prepare_call
from comet_ds.fused.peer.exchange import Exchange
from comet_ds.fused.peer.exposure import ExposureMeter
from comet_ds.fused.refusal import Refusal
from comet_ds.fused.weights import ExpertWeights, why_not_addressable
from comet_ds.gate.topk_gate import TopKGate
from comet_ds.kernels import load_kernels, why_no_kernels
from comet_ds.ranks.gradients import BackwardNeeds
from comet_ds.tuning.cost_model import CtaSplit, LayerShape
from comet_ds.tuning.online import Trial

DTYPES = (torch.bfloat16, torch.float16)
MAX_PREPARED = 64  # sizes of a layer whose launches are remembered


class FusedExperts:
    """What a layer remembers between its calls on the fused path.

    Args:
        max_rows_factor: see ``CometConfig``.

    Attributes:
        weights: the experts' weights; another object when they have changed, None before the first
            call and after a refusal.
        shape, cta_split: layer shape and CTA split of the last forward; None on a single rank.
        meter: measures exposed communication while metrics ask for it.
    """

    def __init__(self, max_rows_factor: float | None = None) -> None:
        self.max_rows_factor = max_rows_factor
        self._recognised = RecognisedExperts()
        self.weights: ExpertWeights | None = None
        self._prepared: dict[Any, PreparedCall] = {}
        self.shape: LayerShape | None = None
        self.cta_split: CtaSplit | None = None
        self.meter: ExposureMeter | None = None

    def __reduce__(self) -> tuple[type, tuple]:
        """Make tables anew in copies."""
        return FusedExperts, (self.max_rows_factor,)

    def recognise(self, experts: Sequence[nn.Module], x: Tensor) -> ExpertWeights | Refusal:
        """Return the weights of the experts, or why they cannot take the fused path with an input.

        Cheap as long as the experts have not changed.

        Args:
            experts: the layer's local experts.
            x: [..., H].
        """
        if x.device.type != "cuda":
            return Refusal(f"it needs a CUDA device, not {x.device.type}")
        if x.dtype not in DTYPES:
            return Refusal(f"it needs bfloat16 or float16, not {x.dtype}")
        if torch.is_autocast_enabled(x.device.type):
            return Refusal("it does not know autocast")
        kernels = load_kernels(x.device)
        if kernels is None:
            return Refusal(f"it has no kernels: {why_no_kernels()}")
        mlps = self._recognised.find(experts, kernels.ModuleWatch)
        if isinstance(mlps, str):
            return Refusal(mlps)
        weights = self.weights
        if weights is not None and _are_weights_of(weights, mlps, x):
            return weights
        self.weights = None
        self._prepared.clear()
        if not kernels.can_plan(len(mlps), 1):
            return Refusal(f"a plan has no room for {len(mlps)} experts")
        if reason := why_not_addressable(mlps, x):
            return Refusal(reason)
        self.weights = ExpertWeights(mlps, kernels)
        return self.weights

    def prepare(
        self,
        weights: ExpertWeights,
        num_tokens: tuple[int, ...],
        gate: TopKGate,
        exchange: Exchange | None = None,
        needs: BackwardNeeds | None = None,
        *,
        num_shares: int = 1,
    ) -> FusedCall:
        """Return a forward, ready to begin. Collective where the group's memory has to grow.

        Args:
            weights: what ``recognise`` has returned.
            num_tokens: T of every rank of the group.
            gate: the layer's.
            exchange: of the expert parallel group, whose ranks all make this call; None where all
                experts are local.
            needs: gradients that any of the ranks needs; None where all experts are local.
            num_shares: ranks that share the tokens of one gate, each of which has ``num_tokens``.

        Raises:
            ValueError: a CUDA graph is being captured, and the call would read the number of rows
                on the host.
        """
        capacities = None
        if gate.drop_tokens:
            by_count = {count: gate.capacity(count * num_shares) for count in set(num_tokens)}
            capacities = tuple(by_count[count] for count in num_tokens)
        num_experts = weights.num_experts * len(num_tokens)
        factor = None if gate.drop_tokens else self.max_rows_factor
        sizes = CallSizes(num_tokens, capacities, gate.k, num_experts, factor)
        if exchange is None:
            return FusedCall(self._launches(weights, sizes), meter=self.meter)
        if sizes.counts_rows and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "a CUDA graph cannot capture a layer that drops no tokens and reads the number of "
                f'its rows on the host: give a bound, "max_rows_factor" of "{CONFIG_KEY}"'
            )
        trial = None
        if exchange.policy.measures:
            shape = layer_shape(weights, sizes, exchange.memory.rank)
            has_backward = needs is not None and needs.has_any and needs.absent is None
            trial = exchange.policy.choose(shape, has_backward)
        prepared = self._launches(weights, sizes, exchange, trial)
        self.shape, self.cta_split = prepared.shape, prepared.cta_split
        is_measured = trial is not None and trial.samples
        return FusedCall(prepared, trial if is_measured else None, needs, self.meter)

    def _launches(
        self,
        weights: ExpertWeights,
        sizes: CallSizes,
        exchange: Exchange | None = None,
        trial: Trial | None = None,
    ) -> PreparedCall:
        """Return the launches of some sizes, remembered as long as no memory moves."""
        if exchange is None:
            if (found := self._prepared.get(sizes)) is None:
                found = self._remember(sizes, prepare_call(weights, sizes))
            return found
        cta_split = trial.cta_split if trial is not None else exchange.policy.pinned
        key = exchange, sizes, cta_split, exchange.generation
        if (found := self._prepared.get(key)) is None:
            if cta_split is None:
                shape = layer_shape(weights, sizes, exchange.memory.rank)
                cta_split = exchange.policy.choose(shape, has_backward=True).cta_split
            found = prepare_call(weights, sizes, exchange, cta_split)
            self._remember((*key[:3], exchange.generation), found)  # the memory may have grown
        return found

    def _remember(self, key: Any, prepared: PreparedCall) -> PreparedCall:
        if len(self._prepared) >= MAX_PREPARED:
            self._prepared.clear()
        self._prepared[key] = prepared
        return prepared


def _are_weights_of(weights: ExpertWeights, mlps: Sequence[ExpertMLP], x: Tensor) -> bool:
    """Whether the kernels' tables are right for these experts and this input."""
    return (
        weights.mlps == mlps  # train and eval mode have lists of their own, often equal
        and weights.dtype == x.dtype
        and weights.device == x.device
        and weights.is_current()
    )
