# SPDX-License-Identifier: Apache-2.0
"""The bench but for its times: what it calls runs, and what it prints is what it found."""

from __future__ import annotations

import itertools
from dataclasses import asdict

import pytest
import torch
from deepspeed.moe.layer import MoE as DeepSpeedMoE

from comet_ds import MoE, bench
from comet_ds.bench_layers import GatedMLP, Shape
from comet_ds.timing import slowest_rank

SHAPE = Shape(64, 32, 8, 2)


def check_slowest(rank: int, size: int) -> list[list[float]]:
    return slowest_rank([[rank + 0.1, -rank], [3.5, size - rank]], torch.device("cpu"))


def test_slowest_rank_counts(world) -> None:
    assert world(2).run(check_slowest) == [[[1.1, 0.0], [3.5, 2.0]]] * 2


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
        "path": "fused",
        "limit_forward_ms": 1.0,
        "grads_mib": 1.0,
        "errors": {"comet_ds": [1e-3, 2e-3]},
        "layers": {"comet_ds": times},
        "gate": found,
        "kernels": [kernel],
    }
    text = "\n".join(bench._lines(record))
    for part in (
        "limit 1.00 / 3.00 ms",
        "2.00      2.00     6.00     2.00",
        "gate                0.125 ms, f+b 0.375 ms",
        "deepspeed_gate      0.250 ms, f+b 0.500 ms",
        "1.500 ms    600 TFLOP/s, 1.50 x limit; torch  500, ratio 1.20",
    ):
        assert part in text, f"no {part!r} in {text}"
