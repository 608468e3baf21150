# SPDX-License-Identifier: Apache-2.0
"""The fused path: a rank's experts on the kernels of csrc, forward and backward.

One token's way, with the rows of ``RowPlan``:

    forward    x -> dispatch -> up + activation -> down -> combine -> output
    backward   grad -> dispatch -> down, weight and activation -> up -> combine -> x.grad;
               weight gradients

Saved for backward are the dispatched rows and the pre-activations; the rest is computed again in
the epilogue that needs it. No step waits on the host, but the first after parameters have moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from comet_ds.expert_gemm import (
    ALIGNMENT_BYTES,
    ExpertGemm,
    ExpertRows,
    ExpertWeights,
    why_not_addressable,
)
from comet_ds.experts import ExpertMLP, RecognisedExperts
from comet_ds.gate import Routing
from comet_ds.kernels import current_stream, load_kernels, why_no_kernels
from comet_ds.row_ops import sum_rows

DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class RowPlan(ExpertRows):
    """Where the routes of one forward lie as rows; reused in its backward.

    Rows are sorted by expert, tokens ascending, each expert's padded to a multiple of the kernels'
    row block; R bounds their number whatever the routing.

    Attributes:
        row_of_route: [T, K] int64; -1 = dropped.
        token_of_row: [R] int32; -1 = padding.
        row_weights: [R] fp32; routing weight, 0 in padding.
        topk_ids: [T, K] int64; expert of each route.

    Worked example, 2 experts, tokens routed to experts 1, 0, 1, row block 128: rows 0 to 127 are
    expert 0's (token 1, then padding), 128 to 255 expert 1's (tokens 0 and 2, then padding);
    row_of_route is [[128], [0], [129]], expert_offsets [0, 128, 256].
    """

    row_of_route: Tensor
    token_of_row: Tensor
    row_weights: Tensor
    topk_ids: Tensor

    def fields(self) -> tuple[int, ...]:
        """Return PlanFields of csrc/bindings.cpp."""
        tensors = (self.row_of_route, self.token_of_row, self.row_weights, self.expert_offsets)
        num_experts = self.expert_offsets.numel() - 1
        addresses = (t.data_ptr() for t in tensors)
        return *addresses, *self.row_of_route.shape, num_experts, self.max_rows


def plan_rows(routing: Routing, kernels: ModuleType) -> RowPlan:
    """Lay out the kept routes as rows.

    Args:
        routing: from the CUDA gate (with ranks); all its experts are local.
        kernels: the compiled kernels.

    Returns:
        The plan; no host synchronisation.
    """
    ids = routing.topk_ids
    num_tokens, top_k = ids.shape
    num_experts, block = routing.exp_counts.numel(), kernels.row_block
    max_rows = num_tokens * top_k + num_experts * (block - 1)
    if routing.capacity is not None:
        per_expert = min(routing.capacity, num_tokens)
        max_rows = min(max_rows, num_experts * -(-per_expert // block) * block)
    max_rows = max(max_rows // block, 1) * block
    row_of_route = torch.empty_like(ids)
    token_of_row = routing.ranks.new_empty(max_rows)
    row_weights = routing.topk_weights.new_empty(max_rows)
    expert_offsets = routing.ranks.new_empty(num_experts + 1)
    expert_of_block = routing.ranks.new_empty(max_rows // block)
    weights = routing.topk_weights.contiguous()
    inputs = (ids, weights, routing.ranks, routing.kept_counts)
    results = (row_of_route, token_of_row, row_weights, expert_offsets, expert_of_block)
    kernels.plan_rows(
        *(t.data_ptr() for t in (*inputs, *results)),
        num_tokens,
        top_k,
        num_experts,
        current_stream(ids),
    )
    return RowPlan(
        expert_offsets, expert_of_block, max_rows, row_of_route, token_of_row, row_weights, ids
    )


class FusedExperts:
    """The local experts of one layer on the fused path.

    Attributes:
        experts: the layer's modules; looked at again on every call.
    """

    def __init__(self, experts: Sequence[nn.Module]) -> None:
        self.experts = experts
        self._recognised = RecognisedExperts()
        self._weights: ExpertWeights | None = None

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

    def run(self, x: Tensor, routing: Routing) -> Tensor:
        """Compute the layer's output for this rank's tokens, all experts local.

        Args:
            x: [T, H], what ``why_not`` has accepted.
            routing: from the CUDA gate.

        Returns:
            [T, H] in x's dtype. Gradients for x, the routing weights and every expert parameter;
            the same input gives the same bits.
        """
        plan, parameters = plan_rows(routing, self._weights.kernels), self._weights.parameters
        has_backward = torch.is_grad_enabled() and any(
            t.requires_grad for t in (x, routing.topk_weights, *parameters)
        )
        return _FusedMLP.apply(
            _aligned(x), routing.topk_weights, plan, self._weights, has_backward, *parameters
        )


class _FusedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        topk_weights: Tensor,
        plan: RowPlan,
        weights: ExpertWeights,
        has_backward: bool,
        *parameters: Tensor,
    ) -> Tensor:
        gemm = ExpertGemm(weights, plan)
        rows = _dispatch(x, plan, weights.kernels)
        hidden = x.new_empty(plan.max_rows, weights.ffn)
        pre = None
        if has_backward:
            pre = [torch.empty_like(hidden) for _ in range(1 + weights.is_gated)]
            ctx.plan, ctx.weights = plan, weights
            ctx.versions = [p._version for p in parameters]
            ctx.save_for_backward(rows, *pre)
        gemm.up(rows, hidden, pre)
        y = torch.empty_like(rows)
        gemm.down(hidden, y)
        return sum_rows(y, plan.row_of_route, topk_weights.contiguous())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, *pre = ctx.saved_tensors
        plan, weights = ctx.plan, ctx.weights
        _check_unchanged(weights, ctx.versions)
        gemm, kernels = ExpertGemm(weights, plan), weights.kernels
        needs_parameters = any(ctx.needs_input_grad[5:])
        grad = _aligned(grad)
        dy = _dispatch(grad, plan, kernels)
        # Nobody reads the pre-activations again, unless the graph is kept: their gradients take
        # their place.
        is_kept = torch._C._autograd._get_current_graph_task_keep_graph()
        dpre = [torch.empty_like(p) for p in pre] if is_kept else pre
        weighted_hidden = torch.empty_like(pre[0])
        row_dots = gemm.down_grad(dy, plan.row_weights, pre, dpre, weighted_hidden)
        grad_topk_weights = _grad_topk_weights(plan, row_dots, grad, weights)
        grads = _ParameterGrads(gemm)
        if needs_parameters:  # what is not needed any more goes before the next is allocated
            grads.add(dy, weighted_hidden, is_weighted=True)
        del dy, weighted_hidden, row_dots
        grad_x = None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(rows)
            gemm.up_grad(dpre, dx)
            grad_x = sum_rows(dx, plan.row_of_route)
            del dx
        if needs_parameters:
            for dpre_of_matrix in dpre:
                grads.add(dpre_of_matrix, rows, is_weighted=False)
                dpre_of_matrix.untyped_storage().resize_(0)  # autograd still has a reference
        return grad_x, grad_topk_weights, None, None, None, *grads.in_order(needs_parameters)


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


def _dispatch(tokens: Tensor, plan: RowPlan, kernels: ModuleType) -> Tensor:
    """Return [R, H]: every row its token, padding zero."""
    rows = tokens.new_empty(plan.max_rows, tokens.shape[1])
    row_bytes = tokens.shape[1] * tokens.element_size()
    kernels.dispatch_rows(
        plan.fields(), tokens.data_ptr(), rows.data_ptr(), row_bytes, current_stream(tokens)
    )
    return rows


def _grad_topk_weights(
    plan: RowPlan, row_dots: Tensor, grad: Tensor, weights: ExpertWeights
) -> Tensor:
    """Return [T, K] fp32: <grad, expert output> of every kept route, 0 elsewhere."""
    result = plan.row_weights.new_empty(plan.topk_ids.shape)
    bias, _ = weights.bias_addresses(-1)
    weights.kernels.sum_row_dots(
        plan.fields(),
        plan.topk_ids.data_ptr(),
        row_dots.data_ptr(),
        row_dots.shape[0],
        grad.data_ptr(),
        bias,
        weights.hidden,
        weights.dtype == torch.bfloat16,
        result.data_ptr(),
        current_stream(grad),
    )
    return result


class _ParameterGrads:
    """Gradients of ``ExpertWeights.parameters``, computed matrix by matrix, ``down`` first."""

    def __init__(self, gemm: ExpertGemm) -> None:
        self.gemm = gemm
        self._weights: list[tuple[Tensor, ...]] = []
        self._biases: list[tuple[Tensor, ...]] = []

    def add(self, a: Tensor, b: Tensor, *, is_weighted: bool) -> None:
        """Add a^T b over every expert's rows, and where the matrix has a bias the sum of a's rows.

        Args:
            a, b: [R, m], [R, n].
            is_weighted: for the bias multiply a's rows by the routing weight.
        """
        weights, plan = self.gemm.weights, self.gemm.rows
        num_experts = len(weights.mlps)
        result = a.new_empty(num_experts, a.shape[1], b.shape[1])
        self.gemm.weight_grad(a, b, result)
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

    def in_order(self, is_needed: bool) -> list[Tensor | None]:
        """Return them in the parameters' order, or as many times None."""
        if not is_needed:
            return [None] * len(self.gemm.weights.parameters)
        groups = [*self._weights[1:], self._weights[0]]
        if self._biases:
            num_first = int(self.gemm.weights.biases[-1] is not None)
            groups += [*self._biases[num_first:], *self._biases[:num_first]]
        return [grad for group in groups for grad in group]
