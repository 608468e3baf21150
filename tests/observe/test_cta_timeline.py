# SPDX-License-Identifier: Apache-2.0
"""Timelines: from records to shares, traces and pictures; and recording on a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.parity import build
from helpers.recording import make_records

from comet_ds import MoE
from comet_ds.observe import cta_timeline as recorder
from comet_ds.observe.cta_timeline import (
    RECORD,
    THREAD_NAMES,
    LayerRecorder,
    Timeline,
    describe,
    write,
)


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
    trace = json.loads(trace_path.read_text())
    again = Timeline.from_trace(trace)
    assert again.spans == sorted(again.spans, key=lambda s: s.launch) and len(again.spans) == 10
    assert again.summaries() == timeline.summaries()
    names = {e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"}
    assert names == {f"CTA {s.cta} {THREAD_NAMES[s.row]}" for s in timeline.spans}
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000


RUN = """
import sys; sys.path.insert(0, {tests!r})
from helpers.recording import record_layer
record_layer()
"""


REFERENCE = {"path": "reference"}


def test_recorded_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first wanted forward and its backward, whatever runs between and after them."""
    calls: list[tuple[str, str]] = []
    kernels = SimpleNamespace(has_timeline=True)
    now = ["setup"]

    class Recorder:
        def __init__(self, found: object, num_sms: int) -> None:
            assert (found, num_sms) == (kernels, 132)

        def resume(self) -> None:
            calls.append(("resume", now[0]))

        def pause(self) -> None:
            calls.append(("pause", now[0]))

        def read(self) -> str:
            return "what was recorded"

    monkeypatch.setattr(recorder, "TimelineRecorder", Recorder)
    monkeypatch.setattr(recorder, "load_kernels", lambda device: kernels)
    monkeypatch.setattr(recorder, "num_sms", lambda device: 132)
    layer, wanted = build(MoE, 0), [False]
    layer_recorder = LayerRecorder(layer, lambda: wanted[0])
    x = torch.randn(8, layer.deepspeed_moe.gate.wg.in_features)

    def forward(name: str) -> torch.Tensor:
        now[0] = name
        return layer(x.clone().requires_grad_())[0]

    forward("unwanted").sum().backward()
    assert layer_recorder.read_timeline() is None
    wanted[0] = True
    output, later = forward("first"), forward("second")
    now[0] = "backward of second"
    later.sum().backward()
    now[0] = "backward of first"
    output.sum().backward()
    forward("third").sum().backward()
    when = ["first", "first", "backward of first", "backward of first"]
    assert calls == list(zip(["resume", "pause"] * 2, when, strict=True))
    assert layer_recorder.read_timeline() == "what was recorded"
    kernels.has_timeline = False
    other = LayerRecorder(layer, lambda: True)
    forward("without").sum().backward()
    assert len(calls) == 5 and other.read_timeline() is None  # the fifth pauses for reading


@pytest.mark.gpu(1)
def test_recording() -> None:
    import subprocess
    import sys

    script = RUN.format(tests=str(Path(__file__).parent.parent))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip().endswith("recorded"), done.stdout + done.stderr
