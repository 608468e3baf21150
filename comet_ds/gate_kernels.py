# SPDX-License-Identifier: Apache-2.0
"""The gate on CUDA: logits on tensor cores, everything behind them in three launches.

Decisions are those of ``gate.py``'s PyTorch version; csrc/moe/gate.cuh says how they are made.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from comet_ds.kernels import current_stream


class FastLogits(torch.autograd.Function):
    """x [T, H] bf16 times weight [E, H] bf16, transposed: [T, E] fp32.

    H is a multiple of 8. At least as close to fp64 as DeepSpeed's fp32 operation on upcast
    operands; only the order of the sum differs, and that a sum which becomes infinite is NaN. The
    gradient of the logits goes back as two bf16 terms, exact to 16 bits.

    Also returns x for one reader, whose backward must return a new contiguous tensor that nobody
    else holds: the product that makes the gate's gradient adds to it in place.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kernels: ModuleType) -> tuple[Tensor, Tensor]:
        passed = x.view_as(x)
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(passed)
        ctx.set_materialize_grads(False)
        x = x.contiguous()
        ctx.kernels = kernels
        ctx.save_for_backward(x, weight)
        logits = x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)
        if x.shape[0] > 0:
            tensors = (x, weight, logits)
            kernels.gate_logits(
                *(t.data_ptr() for t in tensors), *logits.shape, x.shape[1], current_stream(x)
            )
        return logits, passed

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, grad_passed: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None]:
        if grad is None:
            return grad_passed, None, None
        x, weight = ctx.saved_tensors
        num_tokens, num_experts = grad.shape
        terms = x.new_empty(num_tokens, 2 * num_experts)
        grad = grad.contiguous()
        ctx.kernels.split_bfloat16(
            grad.data_ptr(), terms.data_ptr(), num_tokens, num_experts, current_stream(grad)
        )
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            factors = terms, torch.cat([weight, weight])
            # The reader, _FusedMLP, has allocated it.
            grad_x = torch.mm(*factors) if grad_passed is None else grad_passed.addmm_(*factors)
        if ctx.needs_input_grad[1]:
            both = torch.mm(terms.t(), x, out_dtype=torch.float32)
            grad_weight = torch.empty_like(weight)
            torch.add(both[:num_experts], both[num_experts:], out=grad_weight)
        return grad_x, grad_weight, None


@dataclass(frozen=True)
class Choice:
    """How routes are chosen and kept.

    Attributes:
        top_k: K, routes per token.
        capacity: rows an expert keeps, None for all.
        scores: [T, E] fp32; what the last choice maximises, None for the probabilities.
        priority: [T, E] fp32, K = 1 only; who stays in an overfull expert, None for the first.
        used_token: T entries, K = 1 only; a token whose entry is 0 gets no route; None for all.
    """

    top_k: int
    capacity: int | None
    scores: Tensor | None = None
    priority: Tensor | None = None
    used_token: Tensor | None = None


class RouteTokens(torch.autograd.Function):
    """logits [T, E] fp32, T >= 1, to what ``gate.Routing`` holds."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, choice: Choice, kernels: ModuleType
    ) -> tuple[Tensor, ...]:
        probs = F.softmax(logits, dim=1)
        (num_tokens, num_experts), top_k = probs.shape, choice.top_k
        ids = probs.new_empty(num_tokens, top_k, dtype=torch.int64)
        weights = probs.new_empty(num_tokens, top_k)
        ranks = probs.new_empty(num_tokens, top_k, dtype=torch.int32)
        exp_counts = probs.new_empty(num_experts, dtype=torch.int64)
        kept_counts = probs.new_empty(num_experts, dtype=torch.int32)
        loss_share = probs.new_empty(num_experts)
        l_aux = probs.new_empty(())
        size = kernels.gate_scratch_bytes(num_tokens, num_experts, top_k)
        scratch = probs.new_empty(size, dtype=torch.uint8)
        used = choice.used_token
        if used is not None:
            used = (used.reshape(-1) != 0).view(torch.uint8)
        inputs = (probs, choice.scores, choice.priority, used)
        results = (ids, weights, ranks, kept_counts, exp_counts, loss_share, l_aux, scratch)
        kernels.route_tokens(
            *(0 if t is None else t.data_ptr() for t in inputs),
            -1 if choice.capacity is None else choice.capacity,
            num_tokens,
            num_experts,
            top_k,
            *(t.data_ptr() for t in results),
            current_stream(probs),
        )
        ctx.kernels = kernels
        ctx.save_for_backward(probs, ids, loss_share)
        ctx.mark_non_differentiable(ids, ranks, kept_counts, exp_counts)
        ctx.set_materialize_grads(False)
        return weights, l_aux, ids, ranks, kept_counts, exp_counts

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_weights: Tensor | None, grad_l_aux: Tensor | None, *_: Any
    ) -> tuple[Tensor, None, None]:
        probs, ids, loss_share = ctx.saved_tensors
        if grad_weights is None:
            grad_weights = probs.new_zeros(ids.shape)
        if grad_l_aux is None:
            grad_l_aux = probs.new_zeros(())
        grad_weights, grad_logits = grad_weights.contiguous(), torch.empty_like(probs)
        tensors = (probs, ids, grad_weights, grad_l_aux, loss_share, grad_logits)
        ctx.kernels.route_tokens_backward(
            *(t.data_ptr() for t in tensors), *probs.shape, ids.shape[1], current_stream(probs)
        )
        return grad_logits, None, None
