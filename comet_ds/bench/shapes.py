# SPDX-License-Identifier: Apache-2.0
"""Shapes of MoE layers that are timed."""

from __future__ import annotations

from dataclasses import dataclass

from comet_ds.tuning.hardware import H200


@dataclass(frozen=True)
class Shape:
    """An MoE layer: hidden H, FFN width F, experts E, routes K, gated (SiLU) or GELU experts."""

    hidden: int
    ffn: int
    num_experts: int
    top_k: int
    gated: bool = True

    def gemm_flop(self, num_tokens: int) -> int:
        """Return the FLOP of one expert matrix over all routes of a rank."""
        return 2 * num_tokens * self.top_k * self.hidden * self.ffn

    def forward_limit_ms(self, num_tokens: int) -> float:
        """Return the time the expert GEMMs of a rank take at an H200's ``limit_flops``."""
        return 1e3 * (3 if self.gated else 2) * self.gemm_flop(num_tokens) / H200.limit_flops


SHAPES = {
    "mixtral-8x7b": Shape(4096, 14336, 8, 2),
    "phi-3.5-moe": Shape(4096, 6400, 16, 2),
    "qwen2-moe": Shape(2048, 1408, 64, 4),
    "olmoe": Shape(2048, 1024, 64, 8),
    "qwen3-30b": Shape(2048, 768, 128, 8),
    "gelu-k1": Shape(4096, 14336, 8, 1, gated=False),
}
