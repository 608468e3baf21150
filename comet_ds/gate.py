# SPDX-License-Identifier: Apache-2.0
"""The gate: from token activations to routes.

Everything DeepSpeed decides between the logits and the dispatch is decided here, in this order:
noise, top-k, auxiliary loss, capacity, dropping, weights. The integer decisions and the random
draws are those of ``deepspeed.moe.sharded_moe`` (``top1gating``, ``top2gating``, ``topkgating``),
so a run that swaps the layer in keeps its loss curve; the result is one entry per route, never a
[tokens, experts, capacity] mask.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from deepspeed.moe import sharded_moe
from torch import Tensor

from comet_ds.kernels import load_kernels

GATE_TIMER = "topk_gate"


class Routing(NamedTuple):
    """Where every token of this rank goes, and with which weight.

    Attributes:
        topk_ids: [T, K] int64; global expert of each route, -1 = dropped or unused.
        topk_weights: [T, K] fp32; combine weight of each route, 0 where dropped; carries grad.
        l_aux: 0-dim fp32; load-balancing loss; carries grad.
        exp_counts: [E] int64; routes per expert on this rank, before dropping.
        capacity: most routes an expert has kept on this rank, None where nothing is dropped.
        ranks: [T, K] int32; position of each route among its expert's kept ones, by token, -1 where
            dropped; None where the CUDA kernels did not run.
        kept_counts: [E] int32; kept routes per expert; None likewise.
        tokens: [T, H]; the gate's input for the fused path, which alone may read this and once, so
            that the gradients of both meet in the gate's (csrc/gate_autograd.cpp); None likewise.
    """

    topk_ids: Tensor
    topk_weights: Tensor
    l_aux: Tensor
    exp_counts: Tensor
    capacity: int | None = None
    ranks: Tensor | None = None
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
        flat = torch.where(ids < 0, num_experts, ids).flatten()
        counts = _count(flat, num_experts + 1)
        slots = _position_in_expert(flat, counts).view(ids.shape).masked_fill(ids < 0, 0)
        slots = slots if k == 2 else slots.t()
        size = counts[:-1].max() if capacity is None else torch.tensor(capacity)
        routes = (self.topk_ids.t().int(), slots.int(), self.topk_weights.t())
        return self.l_aux, size, num_experts, *map(Tensor.contiguous, routes), self.exp_counts


class TopKGate(sharded_moe.TopKGate):
    """DeepSpeed's gate with a packed result.

    Constructor, attributes and parameter (``wg.weight`` [E, H]) are DeepSpeed's. Called as a
    module it is DeepSpeed's gate unchanged; ``route`` is what the layer calls. A layer whose gate
    has hooks calls the module, and ``route`` makes the answer.

    Attributes beyond DeepSpeed's:
        exact_logits: compute logits with DeepSpeed's own fp32 operation also where both operands
            are bf16 on CUDA; there tensor cores give the same to fp32 rounding, several times
            faster, and the routing can differ where two experts are that close.
    """

    exact_logits = False
    is_in_layer = False  # while a layer calls it as a module

    def forward(
        self,
        input: Tensor,
        used_token: Tensor | None = None,
        sparse_routes: bool = False,
        use_tutel: bool = False,
    ) -> tuple[Any, ...]:
        """Answer as ``sharded_moe.TopKGate`` does."""
        if self.is_in_layer:
            routing = self.route(input, used_token)
            capacity = self.capacity(input.shape[0]) if self.drop_tokens else None
            return routing.as_deepspeeds(self.k, capacity)
        return super().forward(input, used_token, sparse_routes, use_tutel)

    def _set_ep_group(self, ep_group) -> None:
        """Set the expert parallel group; setting the same one again is allowed."""
        if self.ep_group is not ep_group:
            super()._set_ep_group(ep_group)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the process group out of copies."""
        return {**self.__dict__, "ep_group": None}

    def route(self, x: Tensor, used_token: Tensor | None = None) -> Routing:
        """Route the tokens of this rank.

        Args:
            x: [T, H] floating point; T may be 0.
            used_token: T entries, k = 1 only (ignored for larger k, as in DeepSpeed); a token whose
                entry is 0 gets no route and counts neither in ``exp_counts`` nor in ``l_aux``.

        Returns:
            The routing. NaN in a token's logits is not an error: the token is routed as DeepSpeed
            routes it and its output, ``l_aux`` and gradients are NaN, which is what loss scaling
            looks for. No host synchronisation.

        Source: ``sharded_moe.TopKGate.forward``.
        """
        if self.wall_clock_breakdown:
            self.timers(GATE_TIMER).start()
        capacity = self.capacity(x.shape[0]) if self.drop_tokens else None
        kernels = load_kernels(x.device)
        if kernels is not None and not torch.is_autocast_enabled(x.device.type):
            routing = self._route_by_kernels(x, capacity, used_token, kernels)
        else:
            routing = self.route_by_torch(x, capacity, used_token)
        if self.wall_clock_breakdown:
            self.timers(GATE_TIMER).stop()
            self.gate_time = self.timers(GATE_TIMER).elapsed(reset=True)
        return routing

    def _route_by_kernels(
        self, x: Tensor, capacity: int | None, used_token: Tensor | None, kernels: ModuleType
    ) -> Routing:
        weight = self.wg.weight
        has_jitter = self.noisy_gate_policy == "Jitter" and self.training
        is_bfloat16 = x.dtype == weight.dtype == torch.bfloat16 and x.shape[1] % 8 == 0
        is_aligned = weight.is_contiguous() and (x.data_ptr() | weight.data_ptr()) % 16 == 0
        if is_bfloat16 and is_aligned and not (has_jitter or self.exact_logits):
            *found, tokens = kernels.route_tokens(
                x, weight, **self._choice(x, capacity, used_token)
            )
        else:
            logits, tokens = self._logits(x), x
            found = kernels.route_logits(logits, **self._choice(x, capacity, used_token))
        weights, l_aux, ids, ranks, kept_counts, exp_counts = found
        return Routing(ids, weights, l_aux, exp_counts, capacity, ranks, kept_counts, tokens)

    def route_by_torch(self, x: Tensor, capacity: int | None, used_token: Tensor | None) -> Routing:
        """Route without kernels; arguments and result as those of ``route``."""
        logits = self._logits(x)
        if self.k == 1:
            options = {"used_token": used_token, "rsample": self._samples_first()}
            return top1_routing(logits, capacity, **options, use_rts=self.use_rts)
        if self.k == 2:
            return top2_routing(logits, capacity, sample_second=self.top2_2nd_expert_sampling)
        return topk_routing(logits, capacity, k=self.k)

    def _samples_first(self) -> bool:
        return self.noisy_gate_policy == "RSample" and self.training

    def _logits(self, x: Tensor) -> Tensor:
        """Return [T, E], fp32 but under autocast."""
        x = x.float()
        if self.noisy_gate_policy == "Jitter" and self.training:
            x = sharded_moe.multiplicative_jitter(x, device=x.device)
        return F.linear(x, self.wg.weight.float())

    def _choice(self, x: Tensor, capacity: int | None, used_token: Tensor | None) -> dict[str, Any]:
        """Return what the kernels choose by; draws what DeepSpeed draws, in its order.

        GateOptions in csrc/gate_autograd.cpp.
        """
        shape = torch.Size((x.shape[0], self.wg.weight.shape[0]))
        noise = priority = None
        if (self.k == 1 and self._samples_first()) or (
            self.k == 2 and self.top2_2nd_expert_sampling
        ):
            noise = sharded_moe.gumbel_rsample(shape, device=x.device)
        if self.k == 1 and self.use_rts:
            priority = torch.rand(shape, device=x.device)
        return {
            "top_k": self.k,
            "capacity": capacity,
            "noise": noise,
            "priority": priority,
            "used_token": used_token if self.k == 1 else None,
        }

    def capacity(self, num_tokens: int) -> int:
        """Return how many routes of this rank an expert accepts, in rows.

        The product is rounded in fp32 before the ceiling, as DeepSpeed's ``_capacity`` does on
        0-dim tensors; in double precision factors like 1.1 give another ceiling.
        """
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        rows = _scaled_rows(num_tokens / self.wg.weight.shape[0], float(factor * self.k))
        return max(rows, self.min_capacity)


@functools.lru_cache(maxsize=128)
def _scaled_rows(rows: float, factor: float) -> int:
    return int(torch.ceil(rows * torch.tensor(factor)))


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
