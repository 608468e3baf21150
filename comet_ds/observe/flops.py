# SPDX-License-Identifier: Apache-2.0
"""FLOP of a model's training, and the peak of the GPU that it runs on."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from deepspeed.utils import groups
from deepspeed.utils.bwc import bwc_tensor_model_parallel_world_size
from torch import nn

from comet_ds._compat.deepspeed import expert_tensor_parallel_size
from comet_ds.tuning.hardware import peak_flops


def flop_per_token(module: nn.Module) -> float:
    """Return the FLOP of forward and backward for each token, in a rank's part of a model.

    A matrix element takes 2 FLOP in forward, 2 for the input's gradient and, unless it is frozen, 2
    for its own. Of an MoE layer's experts, as many count as a token is routed to. Not counted are
    embeddings whose weight no linear layer shares, biases, norms, attention scores, and forwards
    that activation checkpointing repeats.
    """
    share: dict[int, float] = {}
    # The ranks of a tensor parallel group share a token's routes where they have whole experts.
    is_whole = expert_tensor_parallel_size() == 1
    num_sharing = bwc_tensor_model_parallel_world_size(groups.mpu) if is_whole else 1
    linears = {id(m.weight) for m in module.modules() if isinstance(m, nn.Linear)}
    for child in module.modules():
        if isinstance(child, nn.Embedding) and id(child.weight) not in linears:
            share[id(child.weight)] = 0.0
        if isinstance(child, DeepSpeedMoE):
            per_expert = top_k_of(child) / child.num_local_experts / num_sharing
            share |= {id(p): per_expert for p in child.deepspeed_moe.experts.parameters()}
    matrices = [p for p in module.parameters() if p.dim() >= 2]
    return sum((4 + 2 * p.requires_grad) * p.numel() * share.get(id(p), 1.0) for p in matrices)


def top_k_of(moe: Any) -> int:
    """Return K of a layer of DeepSpeed's or ours."""
    return moe.deepspeed_moe.gate.k


def device_peak_flops(device: torch.device) -> float | None:
    """Return a device's data-sheet peak of dense bf16 in FLOP/s, None where it is not known."""
    if device.type != "cuda":
        return None
    return peak_flops(torch.cuda.get_device_name(device))
