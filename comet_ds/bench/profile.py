# SPDX-License-Identifier: Apache-2.0
"""A GPU's time in a training step, by kind of activity, and how long it is idle.

An activity is a kernel, a copy or a fill, in any stream. Its name decides its kind: the first of
``KINDS`` that matches. Where activities overlap, the time goes to the kind that comes first in
``KINDS``. So the times of all kinds and the idle time add up to the step, and ``communication`` is
the communication that nothing hides.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from deepspeed import comm as dist
from torch.profiler import ProfilerActivity, profile

# "moe" has all kernels of comet_ds except barriers, and kernels of other MoE layers that a name
# tells. DeepSpeed's MoE computes experts by cuBLAS, which counts as "gemm"; sorting and gathering
# of routes count as "other".
KINDS = {
    "moe": r"^(void )?comet_ds::(?![^<(]*barrier)|GroupProblemShape|grouped_(mm|gemm)"
    r"|^_(group_|gather_rows|fill_indices|invert_index|weighted_restore|row_weighting|swiglu)",
    "attention": r"flash|fmha|attention|sdpa",
    "gemm": r"gemm|cutlass|nvjet|xmma|cublas|splitk",
    "optimizer": r"adam|multi_tensor|foreach|norm_?two|lpnorm",
    "norm": r"layer_?norm|gammabeta",
    "copy": r"(?<!mem)copy|memcpy (?!ptop)|memset|fillfunctor|catarray",
    "communication": r"nccl|comet_ds::|memcpy ptop",
    "other": "",
}
DEVICE_CATEGORIES = {"kernel", "gpu_memcpy", "gpu_memset"}
NUM_OTHERS = 5  # names of kind "other" to show, those with the longest times


@dataclass(frozen=True)
class Activity:
    """A kernel, copy or fill."""

    name: str
    start_us: float
    end_us: float


@dataclass(frozen=True)
class StepProfile:
    """A step on one GPU, from the start of its first activity to the end of its last.

    Attributes:
        span_ms: length of the step, under the profiler.
        busy_ms: time in which there is an activity; a barrier between ranks is one.
        num_activities: kernels, copies and fills.
        kinds_ms: time by kind; with ``idle``, they add up to ``span_ms``.
        others_ms: summed durations by name of activities of kind "other", the longest first.
    """

    span_ms: float
    busy_ms: float
    num_activities: int
    kinds_ms: dict[str, float]
    others_ms: dict[str, float]


def classify(name: str) -> str:
    """Return the kind of an activity."""
    return next(kind for kind, form in KINDS.items() if re.search(form, name, re.IGNORECASE))


def covered_us(activities: Iterable[Activity]) -> float:
    """Return the time in us in which there is at least one activity."""
    total, end = 0.0, float("-inf")
    for activity in sorted(activities, key=lambda a: a.start_us):
        total += max(0.0, activity.end_us - max(activity.start_us, end))
        end = max(end, activity.end_us)
    return total


def break_down(activities: list[Activity]) -> StepProfile:
    """Attribute a step's time to kinds.

    Raises:
        ValueError: there are no activities.
    """
    if not activities:
        raise ValueError("the profiler recorded no activity of the GPU")
    by_kind: dict[str, list[Activity]] = {kind: [] for kind in KINDS}
    for activity in activities:
        by_kind[classify(activity.name)].append(activity)
    seen: list[Activity] = []
    kinds_ms, covered = {}, 0.0
    for kind, found in by_kind.items():
        seen += found
        before, covered = covered, covered_us(seen)
        kinds_ms[kind] = (covered - before) / 1e3
    span = max(a.end_us for a in activities) - min(a.start_us for a in activities)
    kinds_ms["idle"] = (span - covered) / 1e3
    others: dict[str, float] = {}
    for activity in by_kind["other"]:
        duration = (activity.end_us - activity.start_us) / 1e3
        others[activity.name] = others.get(activity.name, 0.0) + duration
    longest = sorted(others, key=others.__getitem__, reverse=True)[:NUM_OTHERS]
    return StepProfile(
        span_ms=span / 1e3,
        busy_ms=covered / 1e3,
        num_activities=len(activities),
        kinds_ms=kinds_ms,
        others_ms={name: others[name] for name in longest},
    )


def read_trace(path: Path) -> list[Activity]:
    """Return the activities of a trace that torch's profiler exported."""
    events = json.loads(path.read_text())["traceEvents"]
    return [
        Activity(event["name"], event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") in DEVICE_CATEGORIES
    ]


def profile_step(run: Callable[[], object]) -> StepProfile | None:
    """Run a step; return its profile on rank 0, None on other ranks. Collective."""
    is_profiled = dist.get_rank() == 0
    activities = [ProfilerActivity.CUDA]
    if is_profiled:
        with profile(activities=activities):  # the first use takes long
            torch.ones(1, device="cuda")
    dist.barrier()
    torch.cuda.synchronize()
    if not is_profiled:
        run()
        return None
    with profile(activities=activities) as profiler:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return break_down(read_trace(path))
