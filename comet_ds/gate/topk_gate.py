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
from typing import Any, cast

import torch
import torch.nn.functional as F
from deepspeed.moe import sharded_moe
from torch import Tensor

from comet_ds.gate.routing import Routing, top1_routing, top2_routing, topk_routing
from comet_ds.kernels import Kernels, load_kernels

GATE_TIMER = "topk_gate"


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
        # DeepSpeed annotates ``used_token`` without the None that it defaults to.
        return super().forward(input, cast(Tensor, used_token), sparse_routes, use_tutel)

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
        self, x: Tensor, capacity: int | None, used_token: Tensor | None, kernels: Kernels
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
        weights, l_aux, ids, slots, kept_counts, exp_counts = found
        return Routing(ids, weights, l_aux, exp_counts, capacity, slots, kept_counts, tokens)

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

        GateOptions in csrc/autograd/gate_autograd.cpp.
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
