# SPDX-License-Identifier: Apache-2.0
"""Layers on the fused path of one GPU, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from torch import Tensor

from comet_ds import MoE
from helpers.mlp_forms import FORMS
from helpers.parity import build

Shape = tuple[int, int, int, int, int]  # num_tokens, num_experts, k, hidden, ffn


def draw_case(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return an input and an output gradient, [T, H] on the GPU."""
    torch.manual_seed(5)
    return tuple(torch.randn(shape[0], shape[3], device="cuda").to(dtype) for _ in range(2))


def build_fused(shape: Shape, form: str, dtype: torch.dtype, **options: Any) -> DeepSpeedMoE:
    """Build a layer pinned to the fused path, or DeepSpeed's of the same weights.

    Args:
        shape: its sizes.
        form: key of ``FORMS``.
        dtype: of its parameters.
        options: of the layer; ``cls`` is its class.
    """
    _, num_experts, k, hidden, ffn = shape
    options = {"comet_ds": {"path": "fused"}, "drop_tokens": False, **options}
    cls = options.pop("cls", MoE)
    if cls is DeepSpeedMoE:
        del options["comet_ds"]
    expert = FORMS[form](hidden, ffn)
    sizes = dict(expert=expert, num_experts=num_experts, k=k)
    return build(cls, 0, **sizes, dtype=dtype, device="cuda", **options)
