# SPDX-License-Identifier: Apache-2.0
"""Measuring CTA splits while a model trains; the clock is made up where there is no GPU."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import ClassVar

import pytest
import torch

from comet_ds.kernels import Pass
from comet_ds.tuning import online as refine
from comet_ds.tuning.cost_model import CtaSplit, GemmSplit, LayerShape, choose_split
from comet_ds.tuning.online import (
    FINAL_SAMPLES,
    GEMMS,
    SAMPLES,
    WARM_UP,
    RunTuner,
    ShapeTuner,
    Trials,
)
from comet_ds.tuning.table import Origin, TuningTable, candidates, is_legal, read

FINE = LayerShape((8192, 8192), 0, 8, 128, 2, 2048, 768, "bfloat16", 132)
ORIGIN = Origin("H200", "18 NVLinks", "abc")
NUM_TOKENS = 16384


class Clock:
    """Events on a clock that tests move, in ms."""

    now = 0.0
    by_address: ClassVar[dict[int, Clock]] = {}

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.cuda_event = len(Clock.by_address) + 1
        Clock.by_address[self.cuda_event] = self

    def record(self) -> None:
        self.time = Clock.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: Clock) -> float:
        return other.time - self.time


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_cuda(monkeypatch.setattr)


def patch_cuda(set_attribute=setattr) -> None:
    set_attribute(torch.cuda, "Event", Clock)
    set_attribute(torch.cuda, "is_current_stream_capturing", lambda: False)


def plain(cta_split: CtaSplit) -> dict[str, tuple]:
    return {field: tuple(choice[:2]) for field, choice in cta_split._asdict().items()}


def spend(trial: refine.Trial, cost, gemms=tuple(GEMMS)) -> None:
    """Go through a forward and backward whose GEMMs take cost(field, point) ms."""
    for gemm in gemms:
        field = GEMMS[gemm]
        events = [Clock.by_address[address] for address in trial.events(gemm) if address]
        for event in events[:1]:
            event.record()
        Clock.now += cost(field, getattr(trial.cta_split, field))
        for event in events[1:]:
            event.record()


def far_from(wanted: CtaSplit):
    """Return a cost that is least at some points."""

    def cost(field: str, point: tuple) -> float:
        pairs = zip(point[:2], getattr(wanted, field)[:2], strict=True)
        return 10.0 + sum(abs(a - b) for a, b in pairs)

    return cost


def run_through(tuner: ShapeTuner, cost, gemms=tuple(GEMMS)) -> list[CtaSplit]:
    """Run until the points are found; return what was tried."""
    seen = []
    while tuner.best is None:
        trial = tuner.next(NUM_TOKENS)
        if tuner.best is None:
            assert is_legal(trial.cta_split, tuner.shape)
            seen.append(trial.cta_split)
            spend(trial, cost, gemms)
    return seen


def alone(medians: dict) -> list[dict]:
    """Gather of a group of one."""
    return [medians]


@pytest.mark.parametrize("is_pushed", [False, True], ids=["tokens pulled", "tokens pushed"])
def test_trials_find_the_fastest(is_pushed: bool) -> None:
    """All candidates of all fields are tried, the fastest beside the default once more; each
    field's GEMM decides for itself. Whether tokens are sent stays as it is."""
    shape = FINE if is_pushed else replace(FINE, num_tokens=(8192,) * 8)
    default = wanted = choose_split(shape)
    assert default.is_pushed == is_pushed
    tried = {
        field: [d for d in others if d.is_pushed == is_pushed]
        for field, others in candidates(default, shape).items()
    }
    for field, others in tried.items():
        if others:
            wanted = wanted._replace(**{field: getattr(others[-1], field)})
    tuner = ShapeTuner(shape, alone)
    seen = run_through(tuner, far_from(wanted))
    assert plain(tuner.best) == plain(wanted)
    longest = max(len(others) + 1 for others in tried.values())
    first, last = seen[: WARM_UP + SAMPLES * longest], seen[WARM_UP + SAMPLES * longest :]
    assert first[:WARM_UP] == [default] * WARM_UP
    for field, others in tried.items():
        counts = Counter(getattr(cta_split, field) for cta_split in first[WARM_UP:])
        assert set(counts) == {getattr(cta_split, field) for cta_split in (default, *others)}
        assert min(counts.values()) >= SAMPLES
    assert [plain(cta_split) for cta_split in last] == [
        plain(default),
        plain(wanted),
    ] * FINAL_SAMPLES
    assert plain(tuner.next(NUM_TOKENS).cta_split) == plain(wanted)


def test_slowest_rank_counts() -> None:
    choices = {"push": [GemmSplit(count, 1, 0.0) for count in (8, 10, 12)]}
    trials = Trials(choices, SAMPLES)

    def best(*medians: list[float], gain: float = 0.0) -> int:
        return trials.best([{"push": m} for m in medians], gain)["push"].num_comm_ctas

    assert best([5.0, 3.0, 4.0]) == 10
    assert best([5.0, 3.0, 4.0], [5.0, 6.0, 4.0]) == 12
    assert best([5.0, 4.95, 4.99], gain=0.02) == 8
    assert best([math.inf, 3.0, 4.0]) == 8  # nothing to compare with
    assert best([5.0, math.inf, 4.0]) == 12


@pytest.mark.parametrize("spread", [0.02, 0.05])
def test_noise_and_tokens_change_nothing(spread: float) -> None:
    """Candidates that are alike, in forwards of unlike tokens: the default nearly always stays."""
    random = Random(0)
    num_replaced = 0
    for _ in range(100):
        tuner = ShapeTuner(FINE, alone)
        while tuner.best is None:
            num_tokens = random.randrange(6000, 11000)
            trial = tuner.next(num_tokens)
            noise = [num_tokens * random.gauss(1.0, spread) / 1e3 for _ in range(4)]
            spend(trial, lambda field, point, noise=noise: noise.pop())
        default = tuner.default
        num_replaced += sum(a != b for a, b in zip(tuner.best, default, strict=True))
    assert num_replaced <= (10 if spread < 0.05 else 100)  # of 400


def test_forwards_alone_decide_nothing_of_backward() -> None:
    wanted = choose_split(FINE)
    for field in ("push", "pull_grad"):
        wanted = candidates(wanted, FINE)[field][0]
    tuner = ShapeTuner(FINE, alone)
    run_through(tuner, far_from(wanted), (Pass.UP, Pass.DOWN))
    assert tuner.best.push[:2] == wanted.push[:2]
    assert tuner.best._replace(push=tuner.default.push) == tuner.default


def test_uneven_tokens_start_alike() -> None:
    shapes = [replace(FINE, num_tokens=(4096, 12288), rank=rank) for rank in range(2)]
    first, second = (ShapeTuner(shape, alone) for shape in shapes)
    assert first.default == second.default == choose_split(FINE)
    assert first._trials.choices == second._trials.choices


def agree(rank: int, size: int, folder: str) -> None:
    """Ranks whose clocks disagree go on with the same points, and one file has them."""
    patch_cuda()
    path = Path(folder) / "table.json"
    tuner = RunTuner(torch.distributed.group.WORLD, ORIGIN, path)
    found = candidates(choose_split(FINE), FINE)["push"]
    # Each rank likes another; both are fine with the third.
    likes, likes_too = found[rank], found[2]

    def cost(field: str, point: tuple) -> float:
        if field != "push" or point == choose_split(FINE).push:
            return 10.0
        return {likes.push: 1.0, likes_too.push: 2.0}.get(point, 20.0)

    shape = replace(FINE, rank=rank)
    while True:
        # Evaluation in between tries nothing.
        without = tuner.trial(shape, has_backward=False)
        assert without.cta_split == choose_split(shape) and not without.samples
        trial = tuner.trial(shape, has_backward=True)
        if next(iter(tuner._tuners.values())).best is not None:
            break
        spend(trial, cost)
    assert plain(trial.cta_split) == plain(likes_too)
    again = tuner.trial(replace(shape, num_tokens=(9000, 8000)), has_backward=False)
    assert again.cta_split == trial.cta_split and not again.samples
    other = tuner.trial(replace(shape, ffn=1024), has_backward=True)
    assert other.cta_split == choose_split(replace(FINE, ffn=1024))
    torch.distributed.barrier()
    table = TuningTable(read(path))
    assert len(read(path)) == 1
    assert plain(table.find(shape, ORIGIN)) == plain(likes_too)


def test_ranks_agree(world, tmp_path: Path) -> None:
    world(2).run(agree, str(tmp_path))
