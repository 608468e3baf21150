# SPDX-License-Identifier: Apache-2.0
"""Measure CTA splits while a model trains.

In its first forwards that have a backward, a layer runs with one candidate after the other
(``tuning.table.candidates``). Each field of a CTA split concerns one GEMM, which is timed by
events: all four fields are tried at once, and nothing waits. Then the ranks of the group compare
times; the slowest rank counts. The fastest candidates run in turns with the cost model's split and
are compared again, and only a candidate that is clearly faster is taken. All ranks continue with
the same split. Layers of one shape share their trials.

Whether tokens are pushed or pulled stays as the cost model has it: no GEMM's time shows the
difference.
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

from comet_ds.kernels import Pass
from comet_ds.tuning.cost_model import CtaSplit, GemmSplit, LayerShape, choose_split
from comet_ds.tuning.table import Origin, TuningKey, candidates, write

# The GEMM that each field of ``CtaSplit`` concerns.
GEMMS = {
    Pass.UP: "pull",
    Pass.DOWN: "push",
    Pass.DOWN_GRAD: "pull_grad",
    Pass.WEIGHT_GRAD: "push_grad",
}
WARM_UP = 4  # forwards that do not count
SAMPLES = 4  # of each candidate
FINAL_SAMPLES = 12  # of the fastest candidate and of the cost model's choice
MIN_SAMPLES = 3  # with fewer, a candidate counts as not measured
GAIN = 0.02  # a candidate must be faster than the cost model's choice by this share


@dataclass(frozen=True)
class Sample:
    """Events around a launch that may still run; ``num_tokens`` are those of all ranks."""

    start: torch.cuda.Event
    end: torch.cuda.Event
    num_tokens: int

    def ms_per_token(self) -> float:
        """Return the time of the launch; waits until it has ended."""
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / max(self.num_tokens, 1)


@dataclass(frozen=True)
class Trial:
    """The CTA split of one forward and its backward.

    Attributes:
        cta_split: the split.
        samples: by field of ``CtaSplit``, the list that its GEMM's time is added to; empty where
            nothing is timed.
        num_tokens: tokens of all ranks.
    """

    cta_split: CtaSplit
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    num_tokens: int = 0

    def events(self, gemm: Pass) -> tuple[int, int]:
        """Return the events to record before and after a launch, 0 where it is not timed."""
        found = self.samples.get(GEMMS[gemm])
        if found is None:
            return 0, 0
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for event in (start, end):  # torch creates an event when it is first recorded
            event.record()
        found.append(Sample(start, end, self.num_tokens))
        return start.cuda_event, end.cuda_event


Medians = dict[str, list[float]]


class Trials:
    """Choices for every field of a CTA split, run in turns, all fields at once.

    Args:
        choices: by field; the first is the one to beat.
        num_samples: samples of each choice.
        num_idle: forwards at first, with the first choices, that are not timed.
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
        """Return the next forward's trial, None after the last.

        Args:
            num_tokens: tokens of all ranks.
        """
        for turn in self._turns:
            at = {name: (turn or 0) % len(found) for name, found in self.choices.items()}
            cta_split = CtaSplit(**{name: self.choices[name][i] for name, i in at.items()})
            if turn is None:
                return Trial(cta_split)
            samples = {name: self._samples[name][i] for name, i in at.items()}
            return Trial(cta_split, samples, num_tokens)
        return None

    def medians(self) -> Medians:
        """Return each choice's median ms per token, infinite with too few samples; waits."""

        def median(samples: list[Sample]) -> float:
            if len(samples) < MIN_SAMPLES:
                return math.inf
            return statistics.median(sample.ms_per_token() for sample in samples)

        return {name: [median(s) for s in found] for name, found in self._samples.items()}

    def best(self, medians: Sequence[Medians], gain: float) -> dict[str, GemmSplit]:
        """Return the fastest choice of each field.

        The first choice is kept where it was not measured, or no other is faster by ``gain``.

        Args:
            medians: those of every rank; the slowest counts.
            gain: share of the first choice's time.
        """
        result = {}
        for name, choices in self.choices.items():
            times = [max(ranks) for ranks in zip(*(m[name] for m in medians), strict=True)]
            fastest = min(range(len(choices)), key=times.__getitem__)
            is_better = math.isfinite(times[0]) and times[fastest] < (1 - gain) * times[0]
            result[name] = choices[fastest if is_better else 0]
        return result


class ShapeTuner:
    """All trials of one shape: of every candidate, then of the fastest and the default.

    Args:
        shape: the layer's.
        gather: returns the medians of all ranks; collective.

    Attributes:
        shape: with the same number of tokens on all ranks.
        default: the cost model's split.
        best: the split that was found, None until then.
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
        """Return the next forward's trial; collective, and waits, after the last of a series."""
        while (trials := self._trials) is not None:
            if (trial := trials.next(num_tokens)) is not None:
                return trial
            medians = self._gather(trials.medians())
            found = trials.best(medians, GAIN if self._is_final else 0.0)
            if self._is_final:
                self.best, self._trials = CtaSplit(**found), None
                break
            pairs = {name: [getattr(self.default, name), point] for name, point in found.items()}
            self._trials, self._is_final = Trials(pairs, FINAL_SAMPLES), True
        assert self.best is not None, "trials end with a result"
        return Trial(self.best)


class RunTuner:
    """Runs the trials of all layers of a group, and keeps the splits they find.

    Args:
        group: process group; all its ranks make the same calls.
        origin: hardware and kernels of this run.
        path: of the table that rank 0 adds the results to.
    """

    def __init__(self, group: Any, origin: Origin, path: Path) -> None:
        self.origin, self.path = origin, path
        self._group = weakref.ref(group)
        self._tuners: dict[tuple[TuningKey, int], ShapeTuner] = {}

    def trial(self, shape: LayerShape, has_backward: bool) -> Trial:
        """Return a forward's trial; without a backward, the default or the split that was found."""
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
        logger.warning(f"comet_ds: CTA split measured in this run: {cta_split.describe()}")
        try:
            write(self.path, shape, self.origin, cta_split)
        except OSError as error:
            logger.warning(f"comet_ds: {self.path} cannot keep it: {error}")
