# SPDX-License-Identifier: Apache-2.0
"""The gate on CUDA: logits on tensor cores, everything behind them in three launches.

Decisions are those of ``gate.py``'s PyTorch version; csrc/moe/gate.cuh says how they are made.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from comet_ds.gradients import first_order_only
from comet_ds.kernels import current_stream


@dataclass
class Choice:
    """How routes are chosen and kept, and which were.

    Attributes:
        top_k: K, routes per token.
        capacity: rows an expert keeps, None for all.
        noise: [T, E] fp32, K <= 2; added to the logits for the last choice, None for nothing.
        priority: [T, E] fp32, K = 1 only; who stays in an overfull expert, None for the first.
        used_token: T entries, K = 1 only; a token whose entry is 0 gets no route; None for all.
        chosen: the result: topk_ids, ranks, kept_counts and exp_counts of ``gate.Routing``. They
            have no gradient, and autograd would take its time to note that.
    """

    top_k: int
    capacity: int | None
    noise: Tensor | None = None
    priority: Tensor | None = None
    used_token: Tensor | None = None
    chosen: tuple[Tensor, ...] = ()


class RouteTokens(torch.autograd.Function):
    """x [T, H] bf16 and weight [E, H] bf16 to what ``gate.Routing`` holds, H a multiple of 8.

    The logits are at least as close to fp64 as DeepSpeed's fp32 operation on upcast operands; only
    the order of the sum differs, and that a sum which becomes infinite is NaN. The gradient of the
    logits goes back as two bf16 terms, exact to 16 bits.

    Also returns x for one reader, fused.py's function, whose backward must return a new contiguous
    tensor that nobody else holds: the product that makes the gate's gradient adds to it in place.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, choice: Choice, kernels: ModuleType
    ) -> tuple[Tensor, ...]:
        passed = x.view_as(x)
        x = x.contiguous()
        logits = gate_logits(x, weight, kernels)
        saved, weights, l_aux = _route(logits, choice, kernels)
        ctx.kernels = kernels
        ctx.save_for_backward(x, weight, *saved)
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(passed)
        ctx.set_materialize_grads(False)
        return weights, l_aux, passed

    @staticmethod
    @first_order_only
    def backward(
        ctx: Any,
        grad_weights: Tensor | None,
        grad_l_aux: Tensor | None,
        grad_passed: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        if grad_weights is None and grad_l_aux is None:
            return grad_passed, None, None, None
        x, weight, *saved = ctx.saved_tensors
        grad = _route_backward(saved, grad_weights, grad_l_aux, ctx.kernels)
        needed = ctx.needs_input_grad[:2]
        grads = gate_logits_backward(grad, x, weight, ctx.kernels, needed, add_to=grad_passed)
        return *grads, None, None


class RouteLogits(torch.autograd.Function):
    """logits [T, E] fp32 to what ``gate.Routing`` holds."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, choice: Choice, kernels: ModuleType
    ) -> tuple[Tensor, ...]:
        saved, *results = _route(logits, choice, kernels)
        ctx.kernels = kernels
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @first_order_only
    def backward(
        ctx: Any, grad_weights: Tensor | None, grad_l_aux: Tensor | None
    ) -> tuple[Tensor, None, None]:
        grads = grad_weights, grad_l_aux
        return _route_backward(ctx.saved_tensors, *grads, ctx.kernels), None, None


def gate_logits(x: Tensor, weight: Tensor, kernels: ModuleType) -> Tensor:
    """Return x [T, H] bf16 times weight [E, H] bf16, transposed: [T, E] fp32."""
    logits = x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)
    if x.shape[0] > 0:
        kernels.gate_logits(x, weight, logits, *logits.shape, x.shape[1], current_stream(x))
    return logits


def gate_logits_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    kernels: ModuleType,
    is_needed: tuple[bool, ...] = (True, True),
    *,
    add_to: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of x and weight, None where they are not needed.

    Args:
        grad: [T, E] fp32, of the logits.
        x, weight: as in ``gate_logits``.
        kernels: the compiled kernels.
        is_needed: of each.
        add_to: [T, H] bf16, to which the gradient of x is added in place; None for nothing.
    """
    num_tokens, num_experts = grad.shape
    terms = x.new_empty(num_tokens, 2 * num_experts)
    kernels.split_bfloat16(grad, terms, num_tokens, num_experts, current_stream(x))
    grad_x = grad_weight = None
    if is_needed[0]:
        factors = terms, torch.cat([weight, weight])
        grad_x = torch.mm(*factors) if add_to is None else add_to.addmm_(*factors)
    if is_needed[1]:
        both = torch.mm(terms.t(), x, out_dtype=torch.float32)
        grad_weight = torch.empty_like(weight)
        torch.add(both[:num_experts], both[num_experts:], out=grad_weight)
    return grad_x, grad_weight


def _route(
    logits: Tensor, choice: Choice, kernels: ModuleType
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Choose and keep routes; sets ``choice.chosen``.

    Returns:
        What ``_route_backward`` wants: probabilities [T, E] fp32, topk_ids, loss_share [E] fp32.
        Then topk_weights and l_aux of ``gate.Routing``.
    """
    (num_tokens, num_experts), top_k = logits.shape, choice.top_k
    probs = torch.softmax(logits, dim=1)
    ids = probs.new_empty(num_tokens, top_k, dtype=torch.int64)
    weights = probs.new_empty(num_tokens, top_k)
    ranks = probs.new_empty(num_tokens, top_k, dtype=torch.int32)
    # Zero without tokens: the kernels are not launched then.
    make = torch.zeros if num_tokens == 0 else torch.empty
    exp_counts = make(num_experts, dtype=torch.int64, device=probs.device)
    kept_counts = make(num_experts, dtype=torch.int32, device=probs.device)
    loss_share, l_aux = make(num_experts, device=probs.device), make((), device=probs.device)
    choice.chosen = ids, ranks, kept_counts, exp_counts
    saved = probs, ids, loss_share
    if num_tokens == 0:
        return saved, weights, l_aux
    size = kernels.gate_scratch_bytes(num_tokens, num_experts, top_k)
    scores, used = None, choice.used_token
    if choice.noise is not None:
        scores = logits + choice.noise
    elif top_k == 2:
        scores = logits
    if used is not None:
        used = (used.reshape(-1) != 0).view(torch.uint8)
    kernels.route_tokens(
        probs,
        scores,
        choice.priority,
        used,
        -1 if choice.capacity is None else choice.capacity,
        num_tokens,
        num_experts,
        top_k,
        ids,
        weights,
        ranks,
        kept_counts,
        exp_counts,
        loss_share,
        l_aux,
        probs.new_empty(size, dtype=torch.uint8),
        current_stream(probs),
    )
    return saved, weights, l_aux


def _route_backward(
    saved: tuple[Tensor, ...],
    grad_weights: Tensor | None,
    grad_l_aux: Tensor | None,
    kernels: ModuleType,
) -> Tensor:
    """Return the gradient of the logits, [T, E] fp32."""
    probs, ids, loss_share = saved
    grad_logits = torch.empty_like(probs)
    if probs.shape[0] == 0:
        return grad_logits
    if grad_weights is None:
        grad_weights = probs.new_zeros(ids.shape)
    if grad_l_aux is None:
        grad_l_aux = probs.new_zeros(())
    kernels.route_tokens_backward(
        probs,
        ids,
        grad_weights.contiguous(),
        grad_l_aux,
        loss_share,
        grad_logits,
        *probs.shape,
        ids.shape[1],
        current_stream(probs),
    )
    return grad_logits
