# SPDX-License-Identifier: Apache-2.0
"""What a GPU does during a training step: its activities, by kind, and how long it is idle.

An activity is a kernel, a copy or a fill, of any stream. Kinds are told by names, the first of
``KINDS`` that fits. Where activities overlap, the time is given to the kind that comes first there:
times of kinds and idle time add up to the step, and ``communication`` is what nothing hides.
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

# "moe" is all of comet_ds, and of the other layers what has a name of its own: DeepSpeed's MoE
# computes experts by cuBLAS, found in "gemm"; sorting and gathering routes are in "other".
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
NUM_OTHERS = 5  # names shown of kind "other", the longest


@dataclass(frozen=True)
class Activity:
    """Something a GPU did."""

    name: str
    start_us: float
    end_us: float


@dataclass(frozen=True)
class StepProfile:
    """A step on one GPU, from its first activity to the end of its last.

    Attributes:
        span_ms: length of the step, under the profiler.
        busy_ms: in which there is an activity; a barrier of the ranks is one.
        num_activities: kernels, copies and fills.
        kinds_ms: time by kind; with ``idle``, they add up to ``span_ms``.
        others_ms: summed durations by name, of what ``KINDS`` does not know, the longest first.
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
    """Return the time in which there is at least one activity."""
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
    """Run a step, profiled on rank 0; return its profile there, None elsewhere. Collective."""
    is_profiled = dist.get_rank() == 0
    activities = [ProfilerActivity.CUDA]
    if is_profiled:
        with profile(activities=activities):  # the first time takes long
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
