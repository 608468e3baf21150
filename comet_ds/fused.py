# SPDX-License-Identifier: Apache-2.0
"""The fused path: a rank's experts on the kernels of csrc, forward and backward.

One token's way, with the rows of ``RowPlan``:

    forward    x -> dispatch -> up + activation -> down -> combine -> output
    backward   grad -> dispatch -> down, weight and activation -> up -> combine -> x.grad;
               weight gradients

``dispatcher.py`` has dispatch and combine, on one rank and between ranks.

Saved for backward are the dispatched rows and the pre-activations; the rest is computed again in
the epilogue that needs it. No step waits on the host, but the first after parameters have moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from comet_ds.dispatcher import LocalDispatcher, PeerDispatcher
from comet_ds.exchange import CallShape, Exchange, ExposureMeter
from comet_ds.expert_gemm import ALIGNMENT_BYTES, ExpertGemm, ExpertWeights, why_not_addressable
from comet_ds.experts import ExpertMLP, RecognisedExperts
from comet_ds.gate import Routing, TopKGate
from comet_ds.kernels import current_stream, load_kernels, why_no_kernels
from comet_ds.overlap import Division, LayerShape
from comet_ds.refine import Trial

DTYPES = (torch.bfloat16, torch.float16)


class FusedExperts:
    """The local experts of one layer on the fused path.

    Attributes:
        experts: the layer's modules; looked at again on every call.
        shape, division: what the last forward's division points were chosen for, and they; None
            without other ranks.
        meter: of what communication takes from computation, while anyone asks.
    """

    def __init__(self, experts: Sequence[nn.Module]) -> None:
        self.experts = experts
        self._recognised = RecognisedExperts()
        self._weights: ExpertWeights | None = None
        self.shape: LayerShape | None = None
        self.division: Division | None = None
        self._trial: Trial | None = None  # of the forward that has begun
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
        mlps = self._recognised.find(self.experts)
        if isinstance(mlps, str):
            return mlps
        if not kernels.can_plan(len(mlps), 1):
            return f"a plan has no room for {len(mlps)} experts"
        if not self._fits(mlps, x):
            self._weights = None
            if reason := why_not_addressable(mlps, x):
                return reason
            self._weights = ExpertWeights(mlps, kernels)
        return None

    def _fits(self, mlps: Sequence[ExpertMLP], x: Tensor) -> bool:
        """Whether the tables made last are right for these experts and this input."""
        weights = self._weights
        return (
            weights is not None
            and weights.mlps == mlps  # train and eval mode have lists of their own, often equal
            and (weights.dtype, weights.device) == (x.dtype, x.device)
            and weights.is_current()
        )

    def describe(self) -> str:
        """Return a phrase for the log line."""
        return f"{self._weights.mlps[0].describe()} experts"

    def begin(
        self,
        x: Tensor,
        exchange: Exchange | None,
        num_tokens: tuple[int, ...],
        gate: TopKGate,
    ) -> Tensor:
        """Return the input as ``run`` reads it, on its way to the other ranks while the gate runs.

        Args:
            x: [T, H], what ``why_not`` has accepted.
            exchange, num_tokens: as ``run`` will have them.
            gate: the layer's.
        """
        x, weights = _aligned(x), self._weights
        if exchange is None:
            return x
        num_experts, hidden = gate.wg.weight.shape
        self.shape = LayerShape(
            num_tokens,
            exchange.memory.rank,
            gate.k,
            num_experts,
            1 + weights.is_gated,
            hidden,
            weights.ffn,
            str(weights.dtype).removeprefix("torch."),
            weights.num_sms,
        )
        self._trial = exchange.trial(self.shape, self._has_backward(x, gate.wg.weight))
        self.division = self._trial.division
        is_sent, token_bytes = self.division.is_sent, hidden * x.element_size()
        call = CallShape(num_tokens, gate.k, num_experts, token_bytes, is_sent)
        if is_sent:
            exchange.send_half(0, x, call)
        else:
            exchange.publish_ahead(x, call)
        return x

    def _has_backward(self, *inputs: Tensor) -> bool:
        needed = (*inputs, *self._weights.parameters)
        return torch.is_grad_enabled() and any(t.requires_grad for t in needed)

    def run(
        self,
        routing: Routing,
        exchange: Exchange | None = None,
        num_tokens: tuple[int, ...] = (),
        capacities: Sequence[int] | None = None,
    ) -> Tensor:
        """Compute the layer's output for this rank's tokens.

        Args:
            routing: from the CUDA gate, of what ``begin`` has returned.
            exchange: of the expert parallel group, whose ranks all make this call; None where all
                experts are local.
            num_tokens: T of every rank of the group.
            capacities: most routes of a rank's tokens one expert keeps, by rank; None for no limit.

        Returns:
            [T, H] in the tokens' dtype. Gradients for them, the routing weights and every expert
            parameter; the same input gives the same bits.
        """
        weights, x = self._weights, routing.tokens
        has_backward = self._has_backward(x, routing.topk_weights)
        if exchange is None:
            dispatcher = LocalDispatcher(routing, weights.kernels)
        else:
            arguments = (num_tokens, capacities, self._trial, weights.num_sms, self.meter)
            dispatcher = PeerDispatcher(routing, exchange, *arguments)
        inputs = (x, routing.topk_weights, dispatcher, weights, has_backward)
        return _FusedMLP.apply(*inputs, *weights.parameters)


class _FusedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        topk_weights: Tensor,
        dispatcher: LocalDispatcher | PeerDispatcher,
        weights: ExpertWeights,
        has_backward: bool,
        *parameters: Tensor,
    ) -> Tensor:
        gemm = ExpertGemm(weights, dispatcher.plan, dispatcher.trial)
        rows, pull = dispatcher.dispatch(x)
        hidden = x.new_empty(dispatcher.plan.max_rows, weights.ffn)
        pre = None
        if has_backward:
            pre = [torch.empty_like(hidden) for _ in range(1 + weights.is_gated)]
            ctx.dispatcher, ctx.weights = dispatcher, weights
            ctx.versions = [p._version for p in parameters]
            ctx.save_for_backward(rows, *pre)
        gemm.up(rows, hidden, pre, beside=pull)
        y = torch.empty_like(rows)
        push = dispatcher.push(y, is_weighted=True)
        gemm.down(hidden, y, beside=push)
        return dispatcher.combine(y, is_weighted=True, is_pushed=push is not None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, *pre = ctx.saved_tensors
        dispatcher, weights = ctx.dispatcher, ctx.weights
        _check_unchanged(weights, ctx.versions)
        gemm = ExpertGemm(weights, dispatcher.plan, dispatcher.trial)
        needs_parameters = any(ctx.needs_input_grad[5:])
        dy, pull = dispatcher.dispatch(_aligned(grad))
        # Nobody reads the pre-activations again, unless the graph is kept: their gradients take
        # their place.
        is_kept = torch._C._autograd._get_current_graph_task_keep_graph()
        dpre = [torch.empty_like(p) for p in pre] if is_kept else pre
        weighted_hidden = torch.empty_like(pre[0])
        row_weights = dispatcher.plan.row_weights
        row_dots = gemm.down_grad(dy, row_weights, pre, dpre, weighted_hidden, beside=pull)
        bias, _ = weights.bias_addresses(-1)
        dispatcher.send_grad_weights(row_dots, dy, bias, weights.dtype == torch.bfloat16)
        grads = _ParameterGrads(gemm)
        if needs_parameters:  # what is not needed any more goes before the next is allocated
            grads.add(dy, weighted_hidden, is_weighted=True)
        del dy, weighted_hidden, row_dots
        grad_x = push = None
        has_dx = ctx.needs_input_grad[0] or dispatcher.has_peers
        if has_dx:
            dx = torch.empty_like(rows)
            gemm.up_grad(dpre, dx)
            if needs_parameters:
                push = dispatcher.push(dx, is_weighted=False)
        num_hiding = int(push is not None)  # one weight gradient is long enough
        if needs_parameters:
            grads.add_ups(dpre[:num_hiding], rows, beside=push)
        if has_dx:
            grad_x = dispatcher.combine(dx, is_weighted=False, is_pushed=push is not None)
            del dx
        if needs_parameters:
            grads.add_ups(dpre[num_hiding:], rows)
        grad_weights = dispatcher.grad_weights()
        return grad_x, grad_weights, None, None, None, *grads.in_order(needs_parameters)


def _aligned(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor whose rows can be read 16 bytes at a time."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT_BYTES else tensor


def _check_unchanged(weights: ExpertWeights, versions: Sequence[int]) -> None:
    """Refuse weights changed or moved since forward, as autograd refuses saved tensors."""
    if [p._version for p in weights.parameters] != list(versions) or not weights.is_in_place():
        raise RuntimeError(
            "an expert parameter needed for gradient computation has been modified in place or "
            "moved between forward and backward"
        )


class _ParameterGrads:
    """Gradients of ``ExpertWeights.parameters``, computed matrix by matrix, ``down`` first."""

    def __init__(self, gemm: ExpertGemm) -> None:
        self.gemm = gemm
        self._weights: list[tuple[Tensor, ...]] = []
        self._biases: list[tuple[Tensor, ...]] = []

    def add(self, a: Tensor, b: Tensor, *, is_weighted: bool, beside: object | None = None) -> None:
        """Add a^T b over every expert's rows, and where the matrix has a bias the sum of a's rows.

        Args:
            a, b: [R, m], [R, n].
            is_weighted: for the bias multiply a's rows by the routing weight.
            beside: what CTAs set apart do meanwhile.
        """
        weights, plan = self.gemm.weights, self.gemm.rows
        num_experts = len(weights.mlps)
        result = a.new_empty(num_experts, a.shape[1], b.shape[1])
        self.gemm.weight_grad(a, b, result, beside=beside)
        self._weights.append(result.unbind())
        matrix = len(self._weights) - 2  # -1 is down, which comes first, then 0 and on
        if weights.biases[matrix] is None:
            return
        sums = a.new_empty(num_experts, a.shape[1])
        weights.kernels.sum_expert_rows(
            plan.fields(),
            a.data_ptr(),
            is_weighted,
            a.shape[1],
            weights.dtype == torch.bfloat16,
            sums.data_ptr(),
            current_stream(a),
        )
        self._biases.append(sums.unbind())

    def add_ups(self, dpre: Sequence[Tensor], x: Tensor, *, beside: object | None = None) -> None:
        """Add those of some of the first matrices, in their order, and free what they are made of.

        Args:
            dpre: [R, F] each, freed.
            x: [R, H].
            beside: as in ``add``, of the first.
        """
        for of_matrix in dpre:
            self.add(of_matrix, x, is_weighted=False, beside=beside)
            of_matrix.untyped_storage().resize_(0)  # autograd still has a reference
            beside = None

    def in_order(self, is_needed: bool) -> list[Tensor | None]:
        """Return them in the parameters' order, or as many times None."""
        if not is_needed:
            return [None] * len(self.gemm.weights.parameters)
        groups = [*self._weights[1:], self._weights[0]]
        if self._biases:
            num_first = int(self.gemm.weights.biases[-1] is not None)
            groups += [*self._biases[num_first:], *self._biases[:num_first]]
        return [grad for group in groups for grad in group]
