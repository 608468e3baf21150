# SPDX-License-Identifier: Apache-2.0
"""Records of CTAs: made up, and of a layer on a GPU."""

from __future__ import annotations

import numpy as np
import torch

from comet_ds import MoE
from comet_ds.kernels import Pass, use_timeline_kernels
from comet_ds.observe.cta_timeline import (
    ACTIVITIES,
    MAX_LAUNCHES,
    RECORD,
    LayerRecorder,
    TimelineRecorder,
)
from helpers.parity import build
from helpers.tolerance import relative_error


def make_records() -> np.ndarray:
    """Two launches on 4 CTAs: the first pulls beside tiles and in a tail, the second computes."""
    records = np.zeros((2, 4, 4, 8), dtype=RECORD)

    def put(launch: int, cta: int, row: int, start: int, end: int, gemm: Pass, what: str) -> None:
        index = np.count_nonzero(records[launch, cta, row]["start_ns"])
        code = ACTIVITIES.index(what)
        records[launch, cta, row, index] = (10**9 + start, end - start, gemm, code, 0)

    put(0, 0, 0, 1, 60_001, Pass.UP, "pull")  # 60 us, 40 of them beside two of the other three
    for cta in (1, 2):
        put(0, cta, 2, 1, 30_001, Pass.UP, "multiply")
        put(0, cta, 2, 30_001, 40_001, Pass.UP, "finish")
    put(0, 3, 1, 1, 40_001, Pass.UP, "await rows")
    for cta in range(4):
        put(1, cta, 3, 70_001, 80_001, Pass.WEIGHT_GRAD, "multiply")
    return records


def record_layer() -> None:
    """Record a layer on one GPU, in a process that has loaded no other kernels."""
    use_timeline_kernels()
    options = {"num_experts": 4, "k": 2, "top2_2nd_expert_sampling": False}
    layer = build(MoE, 0, device="cuda", dtype=torch.bfloat16, **options)
    x = torch.randn(512, layer.deepspeed_moe.gate.wg.in_features, device="cuda").bfloat16()

    def run() -> torch.Tensor:
        leaf = x.clone().requires_grad_()
        layer(leaf)[0].sum().backward()
        return leaf.grad

    expected, is_wanted = run(), False
    recorder = LayerRecorder(layer, lambda: is_wanted)
    run()  # is not wanted
    is_wanted = True
    got = run()
    run()  # one is enough
    timeline = recorder.read_timeline()
    assert recorder.read_timeline() is None
    gemms = [s.gemm for s in timeline.summaries()]
    assert gemms == ["up", "down", "down_grad", "weight_grad", "up_grad", "weight_grad"]
    assert len(gemms) <= MAX_LAUNCHES
    assert {s.activity for s in timeline.spans} == {"multiply", "finish"}
    assert all(0 < s.end_us - s.start_us < 1e5 for s in timeline.spans)
    assert torch.equal(got, expected)
    layer = build(
        MoE, 0, device="cuda", dtype=torch.bfloat16, comet_ds={"path": "reference"}, **options
    )
    assert relative_error(got, run()) < 2e-2
    try:
        TimelineRecorder(type("Kernels", (), {"has_timeline": False}), 132)
    except ValueError:
        print("recorded")
