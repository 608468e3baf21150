# SPDX-License-Identifier: Apache-2.0
"""FLOP of a model by token, and the tokens themselves, from which throughput is computed."""

from __future__ import annotations

import torch
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from helpers.parity import HIDDEN as MOE_HIDDEN
from helpers.parity import build

import comet_ds
from comet_ds.observe.flops import flop_per_token
from comet_ds.observe.metrics import TokenCounter


def test_flop_per_token() -> None:
    """6 a matrix element, 4 where it is frozen; of experts those a token goes to."""
    moe = build(comet_ds.MoE, 0, k=2)
    expert = moe.deepspeed_moe.experts.deepspeed_experts[0]
    per_expert = sum(p.numel() for p in expert.parameters() if p.dim() == 2)
    gate = moe.deepspeed_moe.gate.wg.weight.numel()
    head = torch.nn.Linear(MOE_HIDDEN, 100)
    embedding = torch.nn.Embedding(100, MOE_HIDDEN)
    model = torch.nn.ModuleList([embedding, moe, torch.nn.LayerNorm(MOE_HIDDEN), head])
    assert flop_per_token(model) == 6 * (2 * per_expert + gate + 100 * MOE_HIDDEN)
    head.weight = embedding.weight
    assert flop_per_token(model) == 6 * (2 * per_expert + gate + 100 * MOE_HIDDEN)
    moe.deepspeed_moe.experts.requires_grad_(False)
    assert flop_per_token(model) == 8 * per_expert + 6 * (gate + 100 * MOE_HIDDEN)
    theirs = build(DeepSpeedMoE, 0, k=2)
    assert flop_per_token(theirs) == 6 * (2 * per_expert + gate)


def test_tokens_are_counted_however_the_layer_is_called() -> None:
    layer = build(comet_ds.MoE, 0)
    counter, x = TokenCounter(layer), torch.randn(3, 5, MOE_HIDDEN)
    layer(x)
    layer(hidden_states=x)
    layer.eval()(x)
    assert counter.num_tokens == 30
