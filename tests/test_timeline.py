# SPDX-License-Identifier: Apache-2.0
"""Timelines: from records to shares, traces and pictures; and recording on a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from parity import build

from comet_ds import MoE
from comet_ds.expert_gemm import Pass
from comet_ds.kernels import load_kernels, use_timeline_kernels
from comet_ds.recorder import (
    ACTIVITIES,
    MAX_LAUNCHES,
    RECORD,
    Timeline,
    TimelineRecorder,
    describe,
    write,
)


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


def test_shares() -> None:
    timeline = Timeline.from_records(make_records())
    up, weight_grad = timeline.summaries()
    assert (up.gemm, weight_grad.gemm) == ("up", "weight_grad")
    assert up.computing == pytest.approx(2 * 40 / (4 * 60))
    assert up.communicating == pytest.approx(1 / 4)
    assert up.exchange_us == pytest.approx(60)
    assert up.hidden == pytest.approx(40 * (2 / 3) / 60)
    assert weight_grad.hidden is None and weight_grad.computing == 1
    assert (weight_grad.start_us, weight_grad.end_us) == (70, 80)
    assert timeline.hidden_share() == up.hidden
    assert "44%" in describe(timeline)


def test_nothing_recorded() -> None:
    timeline = Timeline.from_records(np.zeros((2, 4, 4, 8), dtype=RECORD))
    assert timeline.summaries() == [] and timeline.hidden_share() is None


def test_trace_and_picture(tmp_path: Path) -> None:
    """A trace has all there is: the same picture comes of it."""
    timeline = Timeline.from_records(make_records())
    trace_path, picture = write(timeline, tmp_path / "new" / "layer", "a title")
    again = Timeline.from_trace(json.loads(trace_path.read_text()))
    assert again.spans == sorted(again.spans, key=lambda s: s.launch) and len(again.spans) == 10
    assert again.summaries() == timeline.summaries()
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000


RUN = """
import sys; sys.path.insert(0, {tests!r})
from test_timeline import record_layer
record_layer()
"""


def record_layer() -> None:
    """Record a layer on one GPU, in a process that has loaded no other kernels."""
    use_timeline_kernels()
    options = {"num_experts": 4, "k": 2, "top2_2nd_expert_sampling": False}
    layer = build(MoE, 0, device="cuda", dtype=torch.bfloat16, **options)
    x = torch.randn(512, layer.deepspeed_moe.gate.wg.in_features, device="cuda").bfloat16()
    kernels = load_kernels(x.device)

    def run() -> torch.Tensor:
        leaf = x.clone().requires_grad_()
        layer(leaf)[0].sum().backward()
        return leaf.grad

    expected = run()
    recorder = TimelineRecorder(kernels, 132)
    with recorder.recording():
        got = run()
    run()  # is not recorded
    timeline = recorder.read()
    gemms = [s.gemm for s in timeline.summaries()]
    assert gemms[:3] == ["up", "down", "down_grad"] and gemms.count("weight_grad") >= 2
    assert len(gemms) <= MAX_LAUNCHES
    assert {s.activity for s in timeline.spans} == {"multiply", "finish"}
    assert all(0 < s.end_us - s.start_us < 1e5 for s in timeline.spans)
    assert torch.equal(got, expected)
    try:
        TimelineRecorder(type("Kernels", (), {"has_timeline": False}), 132)
    except ValueError:
        print("recorded")


@pytest.mark.gpu(1)
def test_recording() -> None:
    import subprocess
    import sys

    script = RUN.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip().endswith("recorded"), done.stdout + done.stderr
