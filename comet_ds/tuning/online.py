# SPDX-License-Identifier: Apache-2.0
"""Measure CTA splits while a model trains.

In its first forwards that have a backward a layer runs with one candidate after the other
(``tuning.candidates``). Each CTA split has a GEMM of its own, whose kernel is timed by events,
so all four are tried at once and nothing waits. Then the ranks of the group compare, the slowest
counts, and the fastest candidates run in turns with the cost model's points, once more compared.
What is not clearly faster then is not taken. All ranks go on with the same points. Layers of one
shape share their trials. Whether tokens are sent stays as it is: what that takes, no GEMM's time
tells.
"""

from __future__ import annotations

import math
import statistics
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.utils import logger

from comet_ds.fused.weights import Pass
from comet_ds.tuning.cost_model import CtaSplit, GemmSplit, LayerShape, choose_split
from comet_ds.tuning.table import Origin, TuningKey, candidates, write

# The GEMM beside which what a field of ``CtaSplit`` divides goes on.
GEMMS = {
    Pass.UP: "pull",
    Pass.DOWN: "push",
    Pass.DOWN_GRAD: "pull_grad",
    Pass.WEIGHT_GRAD: "push_grad",
}
WARM_UP = 4  # forwards that do not count
SAMPLES = 4  # of every candidate
FINAL_SAMPLES = 12  # of the fastest, and of the cost model's points beside them
MIN_SAMPLES = 3
GAIN = 0.02  # a candidate must be this much faster to replace the cost model's


@dataclass(frozen=True)
class Sample:
    """The time of a launch that is under way, for so many tokens of all ranks."""

    start: torch.cuda.Event
    end: torch.cuda.Event
    num_tokens: int

    def ms_per_token(self) -> float:
        """Return it; waits."""
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / max(self.num_tokens, 1)


@dataclass(frozen=True)
class Trial:
    """The CTA splits of one forward and its backward.

    Attributes:
        cta_split: the points.
        samples: by field of ``CtaSplit``, where to note its GEMM's time; empty to note nothing.
        num_tokens: of all ranks.
    """

    cta_split: CtaSplit
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    num_tokens: int = 0

    def events(self, gemm: Pass) -> tuple[int, int]:
        """Return the events to record before and behind a launch, 0 where it is no sample."""
        found = self.samples.get(GEMMS[gemm])
        if found is None:
            return 0, 0
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for event in (start, end):  # an event exists from its first record on
            event.record()
        found.append(Sample(start, end, self.num_tokens))
        return start.cuda_event, end.cuda_event


Medians = dict[str, list[float]]


class Trials:
    """Choices for every field of a cta_split, run in turns, all fields at once.

    Args:
        choices: by field, the first being what the others must beat.
        num_samples: of each.
        num_idle: forwards with the first choices that do not count.
    """

    def __init__(
        self, choices: Mapping[str, Sequence[GemmSplit]], num_samples: int, num_idle: int = 0
    ) -> None:
        self.choices = choices
        self._samples: dict[str, list[list[Sample]]] = {
            name: [[] for _ in found] for name, found in choices.items()
        }
        longest = max(map(len, choices.values()))
        turns = list(range(longest)) * num_samples
        self._turns = iter([None] * num_idle + turns)

    def next(self, num_tokens: int) -> Trial | None:
        """Return the next forward's, for so many tokens of all ranks; None behind the last."""
        for turn in self._turns:
            at = {name: (turn or 0) % len(found) for name, found in self.choices.items()}
            cta_split = CtaSplit(**{name: self.choices[name][i] for name, i in at.items()})
            if turn is None:
                return Trial(cta_split)
            samples = {name: self._samples[name][i] for name, i in at.items()}
            return Trial(cta_split, samples, num_tokens)
        return None

    def medians(self) -> Medians:
        """Return every choice's time, infinite where there are too few samples; waits."""

        def median(samples: list[Sample]) -> float:
            if len(samples) < MIN_SAMPLES:
                return math.inf
            return statistics.median(sample.ms_per_token() for sample in samples)

        return {name: [median(s) for s in found] for name, found in self._samples.items()}

    def best(self, medians: Sequence[Medians], gain: float) -> dict[str, GemmSplit]:
        """Return by field the choice that is fastest on the slowest rank, by all ranks' medians.

        The first where it was not measured itself, or no other is faster by the gain.
        """
        result = {}
        for name, choices in self.choices.items():
            times = [max(ranks) for ranks in zip(*(m[name] for m in medians), strict=True)]
            fastest = min(range(len(choices)), key=times.__getitem__)
            is_better = math.isfinite(times[0]) and times[fastest] < (1 - gain) * times[0]
            result[name] = choices[fastest if is_better else 0]
        return result


class ShapeTuner:
    """All trials of one shape: of every candidate, then of the fastest beside the default.

    Args:
        shape: of the layer.
        gather: gives the values of all ranks, which call it at the same time.
    """

    def __init__(self, shape: LayerShape, gather: Callable[[Medians], list[Medians]]) -> None:
        shape = shape.even()
        self.shape, self.default, self._gather = shape, choose_split(shape), gather
        is_pushed = self.default.is_pushed
        choices = {
            name: [getattr(d, name) for d in (self.default, *others) if d.is_pushed == is_pushed]
            for name, others in candidates(self.default, shape).items()
        }
        self._trials: Trials | None = Trials(choices, SAMPLES, WARM_UP)
        self._is_final = False
        self.best: CtaSplit | None = None

    def next(self, num_tokens: int) -> Trial:
        """Return the next forward's trial. Collective, and waits, where trials end."""
        while self.best is None:
            if (trial := self._trials.next(num_tokens)) is not None:
                return trial
            medians = self._gather(self._trials.medians())
            found = self._trials.best(medians, GAIN if self._is_final else 0.0)
            if self._is_final:
                self.best, self._trials = CtaSplit(**found), None
                break
            pairs = {name: [getattr(self.default, name), point] for name, point in found.items()}
            self._trials, self._is_final = Trials(pairs, FINAL_SAMPLES), True
        return Trial(self.best)


class RunTuner:
    """The trials of all layers of a group, and what came of them.

    Args:
        group: process group, all of whose ranks make the same calls.
        origin: of what it measures.
        path: of the table that rank 0 adds the results to.
    """

    def __init__(self, group: Any, origin: Origin, path: Path) -> None:
        self.origin, self.path = origin, path
        self._group = weakref.ref(group)
        self._tuners: dict[tuple[TuningKey, int], ShapeTuner] = {}

    def trial(self, shape: LayerShape, has_backward: bool) -> Trial:
        """Return a forward's trial; nothing is tried in forwards without a backward."""
        scale = round(math.log2(max(shape.mean_tokens, 1)))
        key = TuningKey.of(shape, self.origin), scale
        if key not in self._tuners:
            self._tuners[key] = ShapeTuner(shape, self._gather)
        tuner = self._tuners[key]
        if tuner.best is not None:
            return Trial(tuner.best)
        if not has_backward or torch.cuda.is_current_stream_capturing():
            return Trial(tuner.default)
        trial = tuner.next(sum(shape.num_tokens))
        if tuner.best is not None:
            self._keep(tuner.shape, tuner.best)
        return trial

    def _gather(self, medians: Medians) -> list[Medians]:
        group = self._group()
        found: list[Any] = [None] * dist.get_world_size(group=group)
        torch.distributed.all_gather_object(found, medians, group=group)
        return found

    def _keep(self, shape: LayerShape, cta_split: CtaSplit) -> None:
        if dist.get_rank(group=self._group()) > 0:
            return
        points = {name: choice[:2] for name, choice in cta_split._asdict().items()}
        logger.warning(f"comet_ds: CTA splits measured in this run: {points}")
        try:
            write(self.path, shape, self.origin, cta_split)
        except OSError as error:
            logger.warning(f"comet_ds: they are not kept: {error}")
