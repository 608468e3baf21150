# SPDX-License-Identifier: Apache-2.0
"""Measure division points while a model trains.

In its first forwards a layer runs with one candidate after the other (``tuning.candidates``). Each
division point has a GEMM of its own, whose kernel is timed by events, so all four are tried at once
and nothing waits. Then the ranks of the group compare, the slowest counts, and all go on with the
same points. Layers of one shape share their trials.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.utils import logger

from comet_ds.expert_gemm import Pass
from comet_ds.overlap import Division, LayerShape, divide
from comet_ds.tuning import TuningKey, candidates, mean_tokens, write

# The GEMM beside which what a field of ``Division`` divides goes on.
GEMMS = {
    Pass.UP: "pull",
    Pass.DOWN: "push",
    Pass.DOWN_GRAD: "pull_grad",
    Pass.WEIGHT_GRAD: "push_grad",
}
WARM_UP = 4  # forwards that do not count
SAMPLES = 5  # of every candidate
GAIN = 0.01  # a candidate must be this much faster to replace what was there

Events = tuple[torch.cuda.Event, torch.cuda.Event]


@dataclass(frozen=True)
class Trial:
    """The division points of one forward and its backward.

    Attributes:
        division: the points.
        samples: by field of ``Division``, where to note its GEMM's time; empty to note nothing.
    """

    division: Division
    samples: dict[str, list[Events]] = field(default_factory=dict)

    @contextlib.contextmanager
    def timed(self, gemm: Pass) -> Iterator[None]:
        """Time the launch inside, where it is a sample."""
        found = self.samples.get(GEMMS.get(gemm, ""))
        if found is None:
            yield
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        found.append((start, end))


class Trials:
    """The trials of one shape.

    Args:
        shape: of the layer.
    """

    def __init__(self, shape: LayerShape) -> None:
        # The same on all ranks, whatever tokens each has.
        shape = replace(shape, num_tokens=(mean_tokens(shape),) * len(shape.num_tokens), rank=0)
        self.default = divide(shape)
        self.choices = {
            name: [self.default, *others]
            for name, others in candidates(self.default, shape).items()
        }
        self._samples: dict[str, list[list[Events]]] = {
            name: [[] for _ in choices] for name, choices in self.choices.items()
        }
        self._order = self._count()

    def _count(self) -> Iterator[int]:
        longest = max(map(len, self.choices.values()))
        return itertools.chain([-1] * WARM_UP, *(range(longest) for _ in range(SAMPLES)))

    def next(self) -> Trial | None:
        """Return the next forward's, None when there are enough."""
        index = next(self._order, None)
        if index is None or index < 0:
            return None if index is None else Trial(self.default)
        points, samples = {}, {}
        for name, choices in self.choices.items():
            at = index % len(choices)
            points[name] = getattr(choices[at], name)
            samples[name] = self._samples[name][at]
        return Trial(Division(**points), samples)

    def medians(self) -> dict[str, list[float]]:
        """Return every candidate's time in ms, infinite where its GEMM did not run; waits."""

        def median(events: list[Events]) -> float:
            for _, end in events:
                end.synchronize()
            times = [start.elapsed_time(end) for start, end in events]
            return statistics.median(times) if times else math.inf

        return {name: [median(e) for e in found] for name, found in self._samples.items()}

    def best(self, medians: list[dict[str, list[float]]]) -> Division:
        """Return the points that are fastest on the slowest rank, by all ranks' medians."""
        points = {}
        for name, choices in self.choices.items():
            times = [max(ranks) for ranks in zip(*(m[name] for m in medians), strict=True)]
            fastest = min(range(len(choices)), key=times.__getitem__)
            is_faster = times[fastest] < (1 - GAIN) * times[0]
            points[name] = getattr(choices[fastest if is_faster else 0], name)
        return Division(**points)


class RunTuner:
    """The trials of all layers of a group, and what came of them.

    Args:
        group: process group, all of whose ranks make the same calls.
        origin: device and fingerprint of the kernels.
        path: of the table that rank 0 adds the results to.
    """

    def __init__(self, group: Any, origin: tuple[str, str], path: Path) -> None:
        self.origin, self.path = origin, path
        self._group = weakref.ref(group)
        self._trials: dict[tuple[TuningKey, int], Trials] = {}
        self._best: dict[tuple[TuningKey, int], Division] = {}

    def trial(self, shape: LayerShape) -> Trial:
        """Return the next forward's trial. Collective, and waits, when a shape's last has run."""
        scale = round(math.log2(max(mean_tokens(shape), 1)))
        key = TuningKey.of(shape, *self.origin), scale
        if key in self._best:
            return Trial(self._best[key])
        if torch.cuda.is_current_stream_capturing():
            return Trial(divide(shape))
        trials = self._trials.get(key) or self._trials.setdefault(key, Trials(shape))
        trial = trials.next()
        if trial is None:
            self._best[key] = self._finish(shape, self._trials.pop(key))
            trial = Trial(self._best[key])
        return trial

    def _finish(self, shape: LayerShape, trials: Trials) -> Division:
        group = self._group()
        medians: list[Any] = [None] * dist.get_world_size(group=group)
        torch.distributed.all_gather_object(medians, trials.medians(), group=group)
        best = trials.best(medians)
        if dist.get_rank(group=group) == 0:
            points = {name: choice[:2] for name, choice in best._asdict().items()}
            logger.warning(f"comet_ds: division points measured in this run: {points}")
            try:
                write(self.path, shape, *self.origin, best)
            except OSError as error:
                logger.warning(f"comet_ds: they are not kept: {error}")
        return best
