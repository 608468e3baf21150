# SPDX-License-Identifier: Apache-2.0
"""Routes of a rank's tokens, decided in plain PyTorch as DeepSpeed decides them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from deepspeed.moe import sharded_moe
from torch import Tensor


class Routing(NamedTuple):
    """Where every token of this rank goes, and with which weight.

    Attributes:
        topk_ids: [T, K] int64; global expert of each route, -1 = dropped or unused.
        topk_weights: [T, K] fp32; combine weight of each route, 0 where dropped; carries grad.
        l_aux: 0-dim fp32; load-balancing loss; carries grad.
        exp_counts: [E] int64; routes per expert on this rank, before dropping.
        capacity: most routes an expert has kept on this rank, None where nothing is dropped.
        slot_in_expert: [T, K] int32; position of each route among its expert's kept ones, by
            token, -1 where dropped; None where the CUDA kernels did not run.
        kept_counts: [E] int32; kept routes per expert; None where the CUDA kernels did not run.
        tokens: [T, H]; the gate's input for the fused path, which alone may read it, and once, so
            that the gradients of both are added in the gate's node
            (csrc/autograd/gate_autograd.cpp); None where the CUDA kernels did not run.
    """

    topk_ids: Tensor
    topk_weights: Tensor
    l_aux: Tensor
    exp_counts: Tensor
    capacity: int | None = None
    slot_in_expert: Tensor | None = None
    kept_counts: Tensor | None = None
    tokens: Tensor | None = None

    def detach(self) -> Routing:
        """Return the same without gradients and tokens."""
        weights, l_aux = self.topk_weights.detach(), self.l_aux.detach()
        return self._replace(topk_weights=weights, l_aux=l_aux, tokens=None)

    def as_deepspeeds(self, k: int, capacity: int | None) -> tuple[Any, ...]:
        """Return what DeepSpeed's gate returns to its layer (``sparse_routes=True``).

        Args:
            k: of the gate; two routes take an expert's slots in another order than one or more.
            capacity: rows per expert; None, where nothing is dropped, takes the fullest expert's
                of this rank (DeepSpeed's: of all ranks of the group).
        """
        num_experts = self.exp_counts.numel()
        ids = self.topk_ids.t() if k == 2 else self.topk_ids
        slots, counts = count_slots(ids, num_experts)
        slots = slots.clamp(min=0) if k == 2 else slots.clamp(min=0).t()
        size = counts.max().long() if capacity is None else torch.tensor(capacity)
        routes = (self.topk_ids.t().int(), slots, self.topk_weights.t())
        return self.l_aux, size, num_experts, *map(Tensor.contiguous, routes), self.exp_counts


def top1_routing(
    logits: Tensor,
    capacity: int | None,
    *,
    used_token: Tensor | None,
    rsample: bool,
    use_rts: bool,
) -> Routing:
    """Route each token to one expert; an overfull expert keeps a random (or the first) capacity.

    Args:
        logits: [T, E] fp32.
        capacity: rows per expert, or None to keep every route.
        used_token: T entries or None; see ``TopKGate.route``.
        rsample: choose the expert from logits + Gumbel noise instead of the probabilities.
        use_rts: random token selection. The [T, E] draw is made even when nothing can be dropped,
            so that the generator advances as DeepSpeed's does.

    Returns:
        Routing with K = 1 and weights not normalised.
    """
    num_tokens, num_experts = logits.shape
    probs = F.softmax(logits, dim=1)
    scores = probs
    if rsample:
        scores = logits + sharded_moe.gumbel_rsample(logits.shape, device=logits.device)
    ids = torch.argmax(scores, dim=1)
    routed = _one_hot(ids, num_experts)
    if used_token is not None:
        routed = routed & (used_token.reshape(-1, 1) != 0)
    l_aux = torch.sum(_mean_over_tokens(probs) * _mean_over_tokens(routed.float())) * num_experts

    priority = routed.long()
    if use_rts:
        priority = priority * torch.rand(logits.shape, device=logits.device)
    kept = routed
    if capacity is not None:
        # torch.topk itself breaks the ties among equal priorities, so it has to be torch.topk.
        chosen = torch.topk(priority, min(capacity, num_tokens), dim=0).indices
        kept = routed & torch.zeros_like(routed).scatter_(0, chosen, 1)
    kept = kept.any(dim=1, keepdim=True)
    ids = ids.unsqueeze(1)
    return Routing(
        topk_ids=ids.masked_fill(~kept, -1),
        topk_weights=probs.gather(1, ids) * kept,
        l_aux=l_aux,
        exp_counts=routed.sum(dim=0),
    )


def top2_routing(logits: Tensor, capacity: int | None, *, sample_second: bool) -> Routing:
    """Route each token to its best expert and a second one.

    Args:
        logits: [T, E] fp32, E >= 2.
        capacity: rows per expert, or None to keep every route. First choices take an expert's
            slots in token order, then second choices in token order.
        sample_second: draw the second expert from logits + Gumbel noise instead of taking the
            next best.

    Returns:
        Routing with K = 2; the weights of a token's kept routes sum to 1.
    """
    num_experts = logits.shape[1]
    probs = F.softmax(logits, dim=1)
    first = torch.argmax(probs, dim=1)
    is_first = _one_hot(first, num_experts)
    scores = logits.detach()
    if sample_second:
        noise = sharded_moe.gumbel_rsample(logits.shape, device=logits.device)
        scores = (scores + noise).to(scores.dtype)  # autocast hands us bf16 logits
    second = torch.argmax(scores.masked_fill(is_first, float("-inf")), dim=1)

    first_share = _mean_over_tokens(is_first.float())
    l_aux = torch.mean(_mean_over_tokens(probs) * first_share) * num_experts * num_experts
    queue = torch.stack([first, second])
    exp_counts = _count(queue.flatten(), num_experts)
    ids = queue.t()
    kept = torch.ones_like(ids, dtype=torch.bool)
    if capacity is not None:
        kept = _position_in_expert(queue.flatten(), exp_counts).view_as(queue).t() < capacity
    weights = probs.gather(1, ids) * kept
    total = weights.sum(dim=1, keepdim=True).clamp(min=torch.finfo(weights.dtype).eps)
    return Routing(ids.masked_fill(~kept, -1), weights / total, l_aux, exp_counts)


def topk_routing(logits: Tensor, capacity: int | None, *, k: int) -> Routing:
    """Route each token to its k most probable experts.

    Args:
        logits: [T, E] fp32, E >= k.
        capacity: rows per expert, or None to keep every route. An overfull expert keeps the
            routes of largest probability.
        k: routes per token.

    Returns:
        Routing with K = k, routes by descending probability; the weights of a token's kept routes
        sum to 1.
    """
    num_tokens, num_experts = logits.shape
    probs = F.softmax(logits, dim=1)
    top_probs, ids = torch.topk(probs, k, dim=1)
    kept = torch.zeros_like(probs, dtype=torch.bool).scatter_(1, ids, 1)
    exp_counts = kept.sum(dim=0)
    share = _mean_over_tokens(kept.float())
    l_aux = torch.mean(_mean_over_tokens(probs) * share) * num_experts * num_experts / k
    if capacity is not None:
        priority = torch.zeros_like(probs).scatter(1, ids, top_probs.detach())
        chosen = torch.topk(priority, min(capacity, num_tokens), dim=0, sorted=False).indices
        kept = kept & torch.zeros_like(kept).scatter_(0, chosen, 1)
    # The sum runs over all experts, not over the k gathered ones: its rounding is DeepSpeed's.
    weights = probs * kept
    total = weights.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).eps)
    route_kept = kept.gather(1, ids)
    return Routing(
        topk_ids=ids.masked_fill(~route_kept, -1),
        topk_weights=(weights / total).gather(1, ids),
        l_aux=l_aux,
        exp_counts=exp_counts,
    )


def count_slots(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Return the position of each route among those of its expert, and how many there are.

    Args:
        ids: int64 of any shape, expert of each route; -1 = no route.
        num_experts: E.

    Returns:
        int32 of the same shape, the position in order of appearance, -1 for no route; and [E]
        int32, routes per expert. [[1, 0], [1, -1]] gives [[0, 0], [1, -1]] and [1, 2].
    """
    flat = torch.where(ids < 0, num_experts, ids).flatten()
    counts = _count(flat, num_experts + 1)
    slots = _position_in_expert(flat, counts).view(ids.shape).masked_fill(ids < 0, -1)
    return slots.int(), counts[:-1].int()


def _one_hot(ids: Tensor, num_experts: int) -> Tensor:
    """Return [T, E] bool, true at each token's expert."""
    return ids.unsqueeze(1) == torch.arange(num_experts, device=ids.device)


def _mean_over_tokens(values: Tensor) -> Tensor:
    """Return the [E] mean over tokens; zeros, still carrying grad, when there is no token."""
    return values.mean(dim=0) if values.shape[0] else values.sum(dim=0)


def _count(ids: Tensor, num_experts: int) -> Tensor:
    """Return how often each expert occurs in ``ids`` (unlike bincount, without a host sync)."""
    counts = torch.zeros(num_experts, dtype=torch.int64, device=ids.device)
    return counts.scatter_add_(0, ids, torch.ones_like(ids))


def _position_in_expert(ids: Tensor, counts: Tensor) -> Tensor:
    """Return each entry's position among the entries of its expert, in order of appearance.

    ids [1, 0, 1, 1] gives [0, 0, 1, 2]. A stable sort replaces DeepSpeed's cumulative sum over a
    [T, E] int64 mask, which moves T * E * 8 bytes several times.
    """
    order = torch.argsort(ids, stable=True)
    start = counts.cumsum(0) - counts
    rank = torch.arange(ids.numel(), device=ids.device) - start[ids[order]]
    return torch.empty_like(ids).scatter_(0, order, rank)
