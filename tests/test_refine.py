# SPDX-License-Identifier: Apache-2.0
"""Measuring division points while a model trains; the clock is made up where there is no GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from comet_ds import refine
from comet_ds.expert_gemm import Pass
from comet_ds.overlap import Division, LayerShape, divide
from comet_ds.refine import GAIN, GEMMS, SAMPLES, WARM_UP, RunTuner, Trials
from comet_ds.tuning import TuningTable, candidates, is_legal, read

FINE = LayerShape((8192, 8192), 0, 8, 128, 2, 2048, 768, "bfloat16", 132, 4)
ORIGIN = ("H200", "abc")


class Clock:
    """Events on a clock that tests move, in ms."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

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


def plain(division: Division) -> dict[str, tuple]:
    return {field: tuple(choice[:2]) for field, choice in division._asdict().items()}


def spend(trial: refine.Trial, cost, gemms=tuple(GEMMS)) -> None:
    """Go through a forward and backward whose GEMMs take cost(field, point) ms."""
    for gemm in gemms:
        field = GEMMS[gemm]
        with trial.timed(gemm):
            Clock.now += cost(field, getattr(trial.division, field))
    with trial.timed(Pass.UP_GRAD):
        Clock.now += 100.0


def far_from(wanted: Division):
    """Return a cost that is least at some points."""

    def cost(field: str, point: tuple) -> float:
        pairs = zip(point[:2], getattr(wanted, field)[:2], strict=True)
        return 10.0 + sum(abs(a - b) for a, b in pairs)

    return cost


def test_trials_find_the_fastest() -> None:
    """Every candidate of every field is tried as often; each field's GEMM decides for itself."""
    default, wanted = divide(FINE), divide(FINE)
    for field, others in candidates(default, FINE).items():
        wanted = wanted._replace(**{field: getattr(others[-1], field)})
    trials, seen = Trials(FINE), []
    while (trial := trials.next()) is not None:
        assert is_legal(trial.division, FINE)
        seen.append(trial.division)
        spend(trial, far_from(wanted))
    longest = max(len(others) + 1 for others in candidates(default, FINE).values())
    assert seen[:WARM_UP] == [default] * WARM_UP and len(seen) == WARM_UP + SAMPLES * longest
    medians = trials.medians()
    for field, others in candidates(default, FINE).items():
        assert len(medians[field]) == len(others) + 1
        tried = {getattr(division, field) for division in seen}
        assert tried == {getattr(division, field) for division in (default, *others)}
    assert plain(trials.best([medians])) == plain(wanted)
    # The slowest rank counts: one on which nothing is faster than the default.
    slow = {field: [50.0, *(60.0 for _ in times[1:])] for field, times in medians.items()}
    assert trials.best([medians, slow]) == default
    noise = {field: [1.0, *(1.0 - GAIN / 2 for _ in t[1:])] for field, t in medians.items()}
    assert trials.best([noise]) == default


def test_forwards_alone_decide_for_forward() -> None:
    wanted = candidates(divide(FINE), FINE)["pull"][0]
    trials = Trials(FINE)
    while (trial := trials.next()) is not None:
        spend(trial, far_from(wanted), (Pass.UP, Pass.DOWN))
    best = trials.best([trials.medians()])
    assert plain(best) == plain(wanted)


def test_uneven_tokens_start_alike() -> None:
    shapes = [replace(FINE, num_tokens=(4096, 12288), rank=rank) for rank in range(2)]
    assert Trials(shapes[0]).choices == Trials(shapes[1]).choices


def agree(rank: int, size: int, folder: str) -> None:
    """Ranks whose clocks disagree go on with the same points, and one file has them."""
    patch_cuda()
    path = Path(folder) / "table.json"
    tuner = RunTuner(torch.distributed.group.WORLD, ORIGIN, path)
    found = candidates(divide(FINE), FINE)["push"]
    # Each rank likes another; both are fine with the third.
    likes, likes_too = found[rank], found[2]

    def cost(field: str, point: tuple) -> float:
        if field != "push" or point == divide(FINE).push:
            return 10.0
        return {likes.push: 1.0, likes_too.push: 2.0}.get(point, 20.0)

    calls, shape = 0, replace(FINE, rank=rank)
    while not tuner._best:
        trial = tuner.trial(shape)
        spend(trial, cost)
        calls += 1
    assert plain(trial.division) == plain(likes_too)
    again = tuner.trial(replace(shape, num_tokens=(9000, 8000)))
    assert again.division == trial.division and not again.samples
    assert tuner.trial(replace(shape, ffn=1024)).division == divide(replace(FINE, ffn=1024))
    torch.distributed.barrier()
    table = TuningTable(read(path))
    assert len(read(path)) == 1
    assert plain(table.find(shape, *ORIGIN)) == plain(likes_too)


def test_ranks_agree(world, tmp_path: Path) -> None:
    world(2).run(agree, str(tmp_path))
