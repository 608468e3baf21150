# SPDX-License-Identifier: Apache-2.0
"""Layers of an expert parallel group on the fused path, and what they are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from torch import Tensor, nn

from comet_ds import MoE
from helpers.experts_zoo import randomize
from helpers.mlp_forms import BF16, FORMS
from helpers.parity import build, run

Shape = tuple[int, int, int, int]  # num_experts, k, hidden, ffn
# Sizes below a tile of 128, beyond one, and in none; few and many routes; experts no power of two.
SHAPES: dict[str, Shape] = {
    "small and even": (8, 2, 128, 192),
    "many routes, sizes in no tile": (24, 6, 200, 136),
    "one route, hidden below a tile": (8, 1, 72, 320),
    "wide, ffn below a tile": (16, 3, 1032, 72),
}


def draw_cases(
    num_tokens: Sequence[int], hidden: int, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """Return every rank's input and output gradient, [T, H] on the GPU."""
    torch.manual_seed(5)
    draws = [torch.randn(2, count, hidden, device="cuda").to(dtype) for count in num_tokens]
    return [d[0] for d in draws], [d[1] for d in draws]


def options_for(shape: Shape, form: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return the options of a layer that drops nothing, for ``parity.build``."""
    num_experts, k, hidden, ffn = shape
    expert = FORMS[form](hidden, ffn)
    return dict(expert=expert, num_experts=num_experts, k=k, dtype=dtype, drop_tokens=False)


def all_experts(shape: Shape, form: str, dtype: torch.dtype) -> list[nn.Module]:
    """Return the experts of all ranks, in fp64."""
    num_experts, _, hidden, ffn = shape
    make = FORMS[form]
    return [randomize(make(hidden, ffn), i).to("cuda", dtype).double() for i in range(num_experts)]


def expert_grads(results: Sequence[dict[str, Tensor]]) -> Tensor:
    """Return the expert gradients of some ranks' results, one behind the other, in fp64."""
    found = [
        t.double().flatten() for r in results for n, t in r.items() if "deepspeed_experts" in n
    ]
    return torch.cat(found)


def run_deepspeed(x: Tensor, grad: Tensor, options: dict[str, Any]) -> dict[str, Tensor]:
    """Run DeepSpeed's layer with all experts; it takes no fewer tokens than min_capacity."""
    return run(build(DeepSpeedMoE, 0, device="cuda", min_capacity=0, **options), x, grad)


def build_pinned(
    rank: int, ep_size: int, shape: Shape = SHAPES["small and even"], **options: Any
) -> MoE:
    """Build a rank's layer pinned to the fused path, whose routing draws nothing."""
    fixed = {"top2_2nd_expert_sampling": False, "parallel": True, "device": "cuda"}
    options = options_for(shape, "swiglu", BF16) | fixed | options
    return build(MoE, rank, ep_size=ep_size, **{"comet_ds": {"path": "fused"}} | options)
