# SPDX-License-Identifier: Apache-2.0
"""The bench of one layer but for its times.

What it times runs, the routing is as skewed or fixed as asked for, the slowest rank counts, and
what is printed is what was found.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict

import pytest
import torch
from deepspeed.moe.layer import MoE as DeepSpeedMoE

from comet_ds import MoE
from comet_ds.bench import layers as bench
from comet_ds.bench.peers import GatedMLP, fix_routing, skew_routing
from comet_ds.bench.shapes import Shape
from comet_ds.bench.timing import slowest_rank

SHAPE = Shape(64, 32, 8, 2)


def check_slowest(rank: int, size: int) -> list[list[float]]:
    return slowest_rank([[rank + 0.1, -rank], [3.5, size - rank]], torch.device("cpu"))


def test_slowest_rank_counts(world) -> None:
    assert world(2).run(check_slowest) == [[[1.1, 0.0], [3.5, 2.0]]] * 2


def check_skew(rank: int, size: int, k: int, std: float) -> tuple[list[int], list[float]]:
    torch.manual_seed(rank)
    expert, x = GatedMLP(SHAPE.hidden, SHAPE.ffn), torch.randn(3000, SHAPE.hidden)
    layers = [kind(SHAPE.hidden, expert, num_experts=8, k=k) for kind in (MoE, DeepSpeedMoE)]
    with torch.no_grad():
        layers[1].deepspeed_moe.gate.wg.weight.copy_(layers[0].deepspeed_moe.gate.wg.weight)
    skew_routing(layers[0], layers[1:], x, std)
    counts = layers[1].deepspeed_moe.gate(x, None)[3]
    assert counts.sum() == 3000 * k
    return counts.tolist(), layers[1].deepspeed_moe.gate.wg.weight[:, 0].tolist()


@pytest.mark.parametrize("k", [2, 4])
def test_routing_is_skewed(world, k: int) -> None:
    """Shares of the experts deviate as much as was asked for, DeepSpeed's too."""
    for std in (0.02, 0.05):
        counts, slopes = zip(*world(2).run(check_skew, k, std), strict=True)
        assert slopes[0] == slopes[1]
        counts = torch.tensor(counts).sum(0)
        assert (counts / counts.sum()).std(unbiased=False) == pytest.approx(std, rel=0.1)


def test_routing_is_fixed(world) -> None:
    """A layer goes on with its routes, whatever its input; a copy of another's gate weighs them."""
    world(1).run(check_fixed)


def check_fixed(rank: int, size: int) -> None:
    torch.manual_seed(0)
    x, other = torch.randn(2, 50, 64)
    options = {"k": 2, "top2_2nd_expert_sampling": False}
    layer, fixed, many = (MoE(64, GatedMLP(64, 32), n, **options) for n in (4, 4, 8))
    for few, router in ((layer, None), (fixed, many.deepspeed_moe.gate.wg)):
        few(x)
        ids = few.deepspeed_moe.routing.topk_ids
        fix_routing(few, router)
        few(other)[0].sum().backward()
        assert torch.equal(few.deepspeed_moe.routing.topk_ids, ids)
        assert few.deepspeed_moe.gate.wg.weight.shape == (4, 64)  # which sizes depend on
    weights = many.deepspeed_moe.gate.route(other).topk_weights
    assert torch.equal(fixed.deepspeed_moe.routing.topk_weights, weights)
    for one in (layer, fixed, many):
        assert one.deepspeed_moe.gate.wg.weight.grad is None


def test_gates_are_timed_and_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = itertools.count(1)

    def time_functions(functions: dict, num_runs: int) -> dict[str, float]:
        for function in functions.values():
            function()
        return {name: next(numbers) / 8 for name in functions}

    monkeypatch.setattr(bench, "time_functions", time_functions)
    layers = [
        kind(SHAPE.hidden, GatedMLP(SHAPE.hidden, SHAPE.ffn), num_experts=8, k=2)
        for kind in (MoE, DeepSpeedMoE)
    ]
    found = bench.time_gates(*layers, torch.randn(100, SHAPE.hidden), 2)
    assert all(layer.deepspeed_moe.gate.wg.weight.grad is not None for layer in layers)
    times = {"device_forward_ms": 2.0, "device_both_ms": 6.0, "wall_forward_ms": 3.0}
    times |= {"wall_both_ms": 7.0, "saved_mib": 1.0, "peak_mib": 2.0}
    kernel = {"pass": "up", "ms": 1.5, "limit_ms": 1.0, "tflops": 600.0, "torch_tflops": 500.0}
    record = {
        "shape": "small",
        **asdict(SHAPE),
        "num_tokens": 100,
        "skew": 0.05,
        "path": "fused",
        "limit_forward_ms": 1.0,
        "grads_mib": 1.0,
        "errors": {"comet_ds": [1e-3, 2e-3]},
        "layers": {"comet_ds": times},
        "gate": found,
        "kernels": [kernel],
    }
    text = " ".join("\n".join(bench._lines(record)).split())  # columns may be of any width
    for part in (
        "skew 0.05, path fused, limit 1.00 / 3.00 ms",
        "comet_ds 3.00 7.00 2.00 2.00 6.00 2.00",  # wall, then device with multiples of the limit
        "gate 0.125 ms, f+b 0.375 ms",
        "deepspeed_gate 0.250 ms, f+b 0.500 ms",
        "up 1.500 ms 600 TFLOP/s, 1.50 x limit; torch 500, ratio 1.20",
    ):
        assert part in text, f"no {part!r} in {text}"
