# SPDX-License-Identifier: Apache-2.0
"""The timeline of the GEMM kernels' CTAs: recorded, summed up, drawn (``comet_ds timeline``).

Kernels that record are compiled separately; those that a layer normally runs have no code for it.
Times are those of this rank's GPU clock.

The hidden share of a launch is a mean over the time in which any CTA communicates: of the CTAs that
do not communicate, the share that computes. It is 1 where all of them compute. CTAs that wait for
rows lower it, and so does a tail with nothing left to compute. Parts of the exchange in other
kernels (publishing, barriers, the final sum) lie between the launches and do not count;
``comet_ds bench`` measures the exchange as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.utils import logger
from torch import Tensor, nn

from comet_ds.kernels import Kernels, Pass, load_kernels, num_sms
from comet_ds.observe.layer_timer import LayerTimer

# Activity in csrc/gemm/timeline.h.
ACTIVITIES = ("pull", "push", "await rows", "await tiles", "multiply", "finish")
COMPUTATION = ("multiply", "finish")
COMMUNICATION = ("pull", "push")
RECORD = np.dtype(
    [
        ("start_ns", "<u8"),
        ("duration_ns", "<u4"),
        ("gemm", "u1"),
        ("activity", "u1"),
        ("reserved", "<u2"),
    ]
)
MAX_LAUNCHES = 16  # of a layer's forward and backward, and of a forward that is repeated
MAX_PAUSE_US = 60.0  # a picture shortens longer pauses between launches
# Threads of a CTA that record, as csrc/gemm/timeline.h numbers them.
THREAD_NAMES = ("communication", "tiles", "math 0", "math 1")
THREADS = len(THREAD_NAMES)
RESOLUTION_US = 0.25  # sums over time count steps of this length


@dataclass(frozen=True)
class Span:
    """One activity of one CTA.

    Attributes:
        launch: index of the kernel launch.
        gemm: the kernel's pass, a name of ``Pass`` in lower case.
        cta: index of the CTA.
        row: index of the recording thread in ``THREAD_NAMES``: 0 communicates, 1 finds tiles, 2
            and 3 are the math warpgroups.
        activity: one of ``ACTIVITIES``.
        start_us, end_us: time since the first record of the timeline.
    """

    launch: int
    gemm: str
    cta: int
    row: int
    activity: str
    start_us: float
    end_us: float


@dataclass(frozen=True)
class LaunchSummary:
    """How a launch's CTAs spent their time.

    Attributes:
        gemm: the kernel's pass.
        start_us, end_us: start of the first record, end of the last.
        computing, communicating: shares of the time of all CTAs, 0 to 1.
        exchange_us: time in which any CTA communicates.
        hidden_us: the part of ``exchange_us`` that computation hides.
    """

    gemm: str
    start_us: float
    end_us: float
    computing: float
    communicating: float
    exchange_us: float
    hidden_us: float

    @property
    def hidden(self) -> float | None:
        """The hidden share, 0 to 1; None where nothing communicates."""
        return self.hidden_us / self.exchange_us if self.exchange_us else None


class Timeline:
    """The spans of some launches.

    Args:
        spans: in any order.
        num_ctas: CTAs of every launch.
    """

    def __init__(self, spans: list[Span], num_ctas: int) -> None:
        self.spans, self.num_ctas = spans, num_ctas

    @classmethod
    def from_records(cls, records: np.ndarray) -> Timeline:
        """Return the timeline of kernels' records.

        Args:
            records: [launches, CTAs, threads, records] ``RECORD``; a start of 0 is no record.
        """
        found = np.argwhere(records["start_ns"] > 0)
        first = records["start_ns"][records["start_ns"] > 0].min() if len(found) else 0
        spans = []
        for launch, cta, row, index in found.tolist():
            record = records[launch, cta, row, index]
            start_us = int(record["start_ns"] - first) / 1e3
            gemm, activity = Pass(record["gemm"]).name.lower(), ACTIVITIES[record["activity"]]
            end_us = start_us + int(record["duration_ns"]) / 1e3
            spans.append(Span(launch, gemm, cta, row, activity, start_us, end_us))
        return cls(spans, records.shape[1])

    def trace(self) -> dict[str, Any]:
        """Return a Chrome trace: launches are its processes, recording threads its threads."""
        events: list[dict[str, Any]] = []
        names = {span.launch: span.gemm for span in self.spans}
        for launch, gemm in sorted(names.items()):
            name = {"name": f"{launch} {gemm}"}
            events.append({"name": "process_name", "ph": "M", "pid": launch, "args": name})
        for launch, cta, row in sorted({(s.launch, s.cta, s.row) for s in self.spans}):
            where = {"pid": launch, "tid": THREADS * cta + row}
            name = {"name": f"CTA {cta} {THREAD_NAMES[row]}"}
            events.append({"name": "thread_name", "ph": "M", **where, "args": name})
        for s in self.spans:
            where = {"pid": s.launch, "tid": THREADS * s.cta + s.row}
            when = {"ts": round(s.start_us, 3), "dur": round(s.end_us - s.start_us, 3)}
            events.append({"name": s.activity, "cat": s.gemm, "ph": "X", **when, **where})
        return {"traceEvents": events, "otherData": {"num_ctas": self.num_ctas}}

    @classmethod
    def from_trace(cls, trace: dict[str, Any]) -> Timeline:
        """Return the timeline that ``trace`` was called on."""
        spans = [
            Span(
                event["pid"],
                event["cat"],
                event["tid"] // THREADS,
                event["tid"] % THREADS,
                event["name"],
                event["ts"],
                event["ts"] + event["dur"],
            )
            for event in trace["traceEvents"]
            if event["ph"] == "X"
        ]
        return cls(spans, trace["otherData"]["num_ctas"])

    def summaries(self) -> list[LaunchSummary]:
        """Return a summary of every launch, in order."""
        by_launch: dict[int, list[Span]] = {}
        for span in self.spans:
            by_launch.setdefault(span.launch, []).append(span)
        return [self._summarise(by_launch[launch]) for launch in sorted(by_launch)]

    def hidden_share(self) -> float | None:
        """Return the hidden share over all launches, None where none communicates."""
        found = self.summaries()
        total = sum(s.exchange_us for s in found)
        return sum(s.hidden_us for s in found) / total if total else None

    def _summarise(self, spans: list[Span]) -> LaunchSummary:
        start, end = min(s.start_us for s in spans), max(s.end_us for s in spans)
        num_times = max(int(np.ceil((end - start) / RESOLUTION_US)), 1)
        computes, communicates = np.zeros((2, self.num_ctas, num_times), dtype=bool)
        for span in spans:
            first, last = ((t - start) / RESOLUTION_US for t in (span.start_us, span.end_us))
            when = slice(round(first), round(last))
            if span.activity in COMPUTATION:
                computes[span.cta, when] = True
            if span.activity in COMMUNICATION:
                communicates[span.cta, when] = True
        others = (~communicates).sum(axis=0)
        shares = (computes & ~communicates).sum(axis=0) / np.maximum(others, 1)
        is_exchange = communicates.any(axis=0)
        return LaunchSummary(
            spans[0].gemm,
            start,
            end,
            float(computes.mean()),
            float(communicates.mean()),
            float(is_exchange.sum()) * RESOLUTION_US,
            float(shares[is_exchange].sum()) * RESOLUTION_US,
        )

    def draw(self, path: Path, title: str) -> None:
        """Draw all CTAs over time.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from matplotlib import patches
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.collections import PolyCollection
        from matplotlib.figure import Figure

        colours = dict(zip(ACTIVITIES, _COLOURS, strict=True))
        figure = Figure(figsize=(18, 7), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        launches = sorted({span.launch for span in self.spans})
        shifts, shift, end = {}, 0.0, 0.0
        for launch, s in zip(launches, self.summaries(), strict=True):
            shift = min(shift, end + MAX_PAUSE_US - s.start_us)
            shifts[launch], end = shift, s.end_us + shift
            hidden = "" if s.hidden is None else f"\nhidden {s.hidden:.0%}"
            at = s.start_us + shift
            axes.text(at, self.num_ctas + 1, f"{s.gemm}{hidden}", va="bottom", fontsize=9)
        for activity, colour in colours.items():
            found = [span for span in self.spans if span.activity == activity]
            boxes = [_box(span, shifts[span.launch]) for span in found]
            axes.add_collection(PolyCollection(boxes, facecolors=colour, linewidths=0))
        axes.set_xlim(0, max(end, 1.0))
        axes.set_ylim(0, self.num_ctas + 12)
        axes.set_xlabel(f"µs on the GPU; pauses between launches are cut to {MAX_PAUSE_US:g}")
        axes.set_ylabel("CTA, one an SM")
        axes.set_title(title, loc="left")
        handles = [patches.Patch(color=c, label=a) for a, c in colours.items()]
        axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=6)
        figure.savefig(path)


_COLOURS = ("#e6820e", "#c2185b", "#9e9e9e", "#757575", "#1f6fb4", "#9cc8ea")


def _box(span: Span, shift_us: float) -> list[tuple[float, float]]:
    """Return the corners of a span: a CTA's two math warpgroups lie above each other."""
    low, high = {0: (0.0, 1.0), 1: (0.45, 0.55), 2: (0.0, 0.5), 3: (0.5, 1.0)}[span.row]
    bottom, top = span.cta + low, span.cta + high
    left, right = span.start_us + shift_us, span.end_us + shift_us
    return [(left, bottom), (left, top), (right, top), (right, bottom)]


class TimelineRecorder:
    """Makes GEMM kernels record that are launched between ``resume`` and ``pause``.

    Args:
        kernels: the kernels that can record (``use_timeline_kernels``).
        num_ctas: CTAs of a launch, one for each SM of the GPU.
    """

    def __init__(self, kernels: Kernels, num_ctas: int) -> None:
        if not kernels.has_timeline:
            raise ValueError("the kernels cannot record: call use_timeline_kernels first")
        self.kernels = kernels
        size = (MAX_LAUNCHES, num_ctas, kernels.record_lists, kernels.max_records)
        num_bytes = int(np.prod(size)) * RECORD.itemsize
        self._records = torch.zeros(num_bytes, dtype=torch.uint8, device="cuda")
        self._size, self._left, self._is_on = size, num_bytes, False

    def resume(self) -> None:
        """Make kernels that are launched from now on record."""
        self._is_on = True
        end = self._records.data_ptr() + self._records.numel()
        self.kernels.set_timeline_room(end - self._left, self._left)

    def pause(self) -> None:
        """Stop; kernels that were launched before still record."""
        if self._is_on:
            self._left, self._is_on = self.kernels.set_timeline_room(0, 0), False

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record kernels that are launched inside the context."""
        self.resume()
        try:
            yield
        finally:
            self.pause()

    def read(self) -> Timeline:
        """Return the timeline that was recorded; waits for the device."""
        torch.cuda.synchronize(self._records.device)
        records = self._records.cpu().numpy().view(RECORD).reshape(self._size)
        if (records["start_ns"][..., -1] > 0).any():
            room = self._size[-1]
            logger.warning(f"comet_ds: the timeline ends early: {room} records a thread")
        return Timeline.from_records(records)


class LayerRecorder(LayerTimer):
    """Records the kernels of one forward of a layer and its backward.

    Args:
        layer: a comet_ds.MoE.
        is_wanted: asked at each forward until it returns True: that forward is recorded.
    """

    def __init__(self, layer: nn.Module, is_wanted: Callable[[], bool]) -> None:
        self._is_wanted, self._num_marks = is_wanted, 0
        self._recorder: TimelineRecorder | None = None
        super().__init__(layer)
        self.is_armed = True

    def _is_timed(self, layer: nn.Module) -> bool:
        is_next = self._num_marks == 0 and self._is_wanted()
        return (is_next or self._num_marks == 1) and super()._is_timed(layer)

    def mark(self, tensor: Tensor) -> float:
        """Begin or stop to record: called at the begin and the end of forward, then of backward."""
        kernels = load_kernels(tensor.device)
        if kernels is not None and kernels.has_timeline:
            if self._recorder is None:
                self._recorder = TimelineRecorder(kernels, num_sms(tensor.device))
            self._recorder.pause() if self._num_marks % 2 else self._recorder.resume()
        self._num_marks += 1
        return 0.0

    def read_timeline(self) -> Timeline | None:
        """Return the timeline and forget it, None if nothing was recorded; waits for the device."""
        recorder, self._recorder = self._recorder, None
        if recorder is None:
            return None
        recorder.pause()
        return recorder.read()


def describe(timeline: Timeline) -> str:
    """Return a table of the launches."""
    lines = ["  pass            ms  computing  communicating  hidden"]
    for s in timeline.summaries():
        hidden = "" if s.hidden is None else f"{s.hidden:7.0%}"
        ms = (s.end_us - s.start_us) / 1e3
        lines.append(
            f"  {s.gemm:11s} {ms:6.3f} {s.computing:10.0%} {s.communicating:14.0%} {hidden}"
        )
    if (share := timeline.hidden_share()) is not None:
        lines.append(f"  hidden share of all: {share:.0%}")
    return "\n".join(lines)


def write(timeline: Timeline, path: Path, title: str) -> list[Path]:
    """Write a trace, and a picture where matplotlib is installed.

    Args:
        timeline: what to write.
        path: of the files, without .json and .png.
        title: of the picture.

    Returns:
        the paths of the files.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    written = [path.with_name(path.name + ".json")]
    written[0].write_text(json.dumps(timeline.trace(), separators=(",", ":")))
    try:
        timeline.draw(picture := path.with_name(path.name + ".png"), title)
        written.append(picture)
    except ImportError:
        print("no picture: pip install matplotlib")
    return written
