# SPDX-License-Identifier: Apache-2.0
"""Shapes of MoE layers that are timed, and the arguments that choose them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

# Dense bf16 rate large matrix products reach on an H200, FLOP/s: what "limit" divides by.
PEAK_FLOPS = 760e12


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
        """Return the time the expert GEMMs of a rank take at ``PEAK_FLOPS``."""
        return 1e3 * (3 if self.gated else 2) * self.gemm_flop(num_tokens) / PEAK_FLOPS


SHAPES = {
    "mixtral-8x7b": Shape(4096, 14336, 8, 2),
    "phi-3.5-moe": Shape(4096, 6400, 16, 2),
    "qwen2-moe": Shape(2048, 1408, 64, 4),
    "olmoe": Shape(2048, 1024, 64, 8),
    "qwen3-30b": Shape(2048, 768, 128, 8),
    "gelu-k1": Shape(4096, 14336, 8, 1, gated=False),
}


def add_shape_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``parse_shapes`` reads."""
    parser.add_argument("--shapes", default=",".join(SHAPES), help="comma-separated names")
    parser.add_argument("--hidden", type=int, help="H of a shape of your own")
    parser.add_argument("--ffn", type=int, help="F")
    parser.add_argument("--experts", type=int, help="E")
    parser.add_argument("--top-k", type=int, help="K")
    parser.add_argument("--gelu", action="store_true", help="two-matrix GELU experts with biases")


def parse_shapes(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict[str, Shape]:
    """Return the shapes asked for by name or by sizes."""
    sizes = {"hidden": args.hidden, "ffn": args.ffn, "experts": args.experts, "top-k": args.top_k}
    if any(sizes.values()):
        if missing := [f"--{key}" for key, size in sizes.items() if not size]:
            parser.error(f"a shape of your own also needs {', '.join(missing)}")
        return {"given": Shape(*sizes.values(), gated=not args.gelu)}
    if unknown := set(args.shapes.split(",")) - set(SHAPES):
        parser.error(f"unknown shapes {sorted(unknown)}, known: {', '.join(SHAPES)}")
    return {name: SHAPES[name] for name in args.shapes.split(",")}
