# SPDX-License-Identifier: Apache-2.0
"""Time one layer against DeepSpeed's, forward and forward + backward.

    torchrun --nproc_per_node 2 -m comet_ds.bench --shapes qwen2-moe,mixtral-8x7b

One expert parallel group over all ranks, bf16, gate included, the same input and weights for both
layers, which must agree before they are timed. Runs are interleaved and the ranks aligned by a
barrier; printed are medians, and the peak memory above what is allocated between steps.
"""

from __future__ import annotations

import argparse
import os
import statistics
from dataclasses import dataclass

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed import comm as dist
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from torch import Tensor, nn

from comet_ds.layer import MoE

# Dense bf16 rate large matrix products reach on an H200, FLOP/s: what "limit" divides by.
PEAK_FLOPS = 760e12
# Largest relative difference of the two layers' outputs and input gradients in bf16.
AGREEMENT = 2e-2


@dataclass(frozen=True)
class Shape:
    """An MoE layer as published: hidden H, FFN width F, experts E, routes K, gated experts."""

    hidden: int
    ffn: int
    num_experts: int
    top_k: int
    gated: bool = True

    def forward_limit_ms(self, num_tokens: int) -> float:
        """Return the time the expert GEMMs of a rank take at ``PEAK_FLOPS``."""
        matrices = 3 if self.gated else 2
        flop = 2 * matrices * num_tokens * self.top_k * self.hidden * self.ffn
        return 1e3 * flop / PEAK_FLOPS


SHAPES = {
    "mixtral-8x7b": Shape(4096, 14336, 8, 2),
    "phi-3.5-moe": Shape(4096, 6400, 16, 2),
    "qwen2-moe": Shape(2048, 1408, 64, 4),
    "olmoe": Shape(2048, 1024, 64, 8),
    "qwen3-30b": Shape(2048, 768, 128, 8),
    "gelu-k1": Shape(4096, 14336, 8, 1, gated=False),
}


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, ffn, bias=False)
        self.up_proj = nn.Linear(hidden, ffn, bias=False)
        self.down_proj = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def build(cls: type[DeepSpeedMoE], shape: Shape) -> DeepSpeedMoE:
    """Build a layer with weights that do not depend on its class."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        if shape.gated:
            expert: nn.Module = GatedMLP(shape.hidden, shape.ffn)
        else:
            up, down = nn.Linear(shape.hidden, shape.ffn), nn.Linear(shape.ffn, shape.hidden)
            expert = nn.Sequential(up, nn.GELU(), down)
        layer = cls(
            shape.hidden,
            expert,
            num_experts=shape.num_experts,
            ep_size=dist.get_world_size(),
            k=shape.top_k,
        )
    layer.to(torch.bfloat16).set_deepspeed_parallelism()
    return layer


def step(layer: DeepSpeedMoE, x: Tensor, grad: Tensor, middle: torch.cuda.Event) -> list[Tensor]:
    """Run forward and backward, mark the middle; return output and input gradient."""
    torch.manual_seed(7)
    x = x.detach().requires_grad_()
    output, l_aux, _ = layer(x)
    middle.record()
    torch.autograd.backward([output, l_aux], [grad, torch.ones_like(l_aux)])
    return [output.detach(), x.grad]


def measure(
    layers: dict[str, DeepSpeedMoE], x: Tensor, grad: Tensor, num_runs: int
) -> dict[str, tuple[float, float, float]]:
    """Return forward ms, forward + backward ms and peak MiB of every layer."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in layers}
    peaks = {}
    for _ in range(num_runs):
        for name, layer in layers.items():
            start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
            dist.barrier()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            start.record()
            step(layer, x, grad, middle)
            end.record()
            torch.cuda.synchronize()
            times[name].append((start.elapsed_time(middle), start.elapsed_time(end)))
            peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
            layer.zero_grad(set_to_none=True)
    medians = {
        name: [statistics.median(column) for column in zip(*t, strict=True)]
        for name, t in times.items()
    }
    return {name: (*medians[name], peaks[name]) for name in layers}


def bench(name: str, num_tokens: int, num_runs: int) -> None:
    """Check that the layers agree on one shape, time them and print a line each."""
    shape = SHAPES[name]
    torch.manual_seed(100 + dist.get_rank())
    x, grad = torch.randn(2, num_tokens, shape.hidden, device="cuda", dtype=torch.bfloat16)
    layers = {"deepspeed": build(DeepSpeedMoE, shape), "comet_ds": build(MoE, shape)}
    for _ in range(3):  # the first call builds kernels
        results = [step(layer, x, grad, torch.cuda.Event()) for layer in layers.values()]
        for layer in layers.values():
            layer.zero_grad(set_to_none=True)
    for expected, got in zip(*results, strict=True):
        error = (got.float() - expected.float()).norm() / expected.float().norm()
        assert error < AGREEMENT, f"{name}: the layers differ by {error:.1e}"
    figures = measure(layers, x, grad, num_runs)
    limit = shape.forward_limit_ms(num_tokens)
    if dist.get_rank() == 0:
        baseline = figures["deepspeed"][1]
        for layer, (forward, both, peak) in figures.items():
            print(
                f"{name:13s} {layer:10s} {forward:8.2f} {both:8.2f} {peak:8.0f} "
                f"{baseline / both:8.2f} {forward / limit:8.2f} {both / (3 * limit):8.2f}",
                flush=True,
            )


def main() -> None:
    """Parse the command line and time every shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=",".join(SHAPES), help="comma-separated names")
    parser.add_argument("--num-tokens", type=int, default=8192, help="tokens a rank")
    parser.add_argument("--num-runs", type=int, default=20)
    args = parser.parse_args()
    if unknown := set(args.shapes.split(",")) - set(SHAPES):
        parser.error(f"unknown shapes {sorted(unknown)}, known: {', '.join(SHAPES)}")
    if not torch.cuda.is_available():
        parser.error("timing needs a CUDA device")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    deepspeed.init_distributed()
    if dist.get_rank() == 0:
        device = torch.cuda.get_device_name()
        print(f"{dist.get_world_size()} x {device}, {args.num_tokens} tokens a rank, bf16")
        columns = ("fwd ms", "f+b ms", "MiB", "speedup", "x limit", "x limit")
        print(f"{'shape':13s} {'layer':10s} " + " ".join(f"{c:>8s}" for c in columns))
    for name in args.shapes.split(","):
        bench(name, args.num_tokens, args.num_runs)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
