# SPDX-License-Identifier: Apache-2.0
"""What a CTA split is taken from: pinned, then the table, then the tuner, then the cost model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from comet_ds.tuning import policy as policy_module
from comet_ds.tuning.cost_model import CtaSplit, LayerShape, choose_split
from comet_ds.tuning.online import Trial
from comet_ds.tuning.policy import SplitPolicy
from comet_ds.tuning.table import Origin, TuningTable, candidates, read, write

MEASURED = LayerShape((8192, 8192), 0, 8, 128, 2, 2048, 768, "bfloat16", 132)
OTHER = replace(MEASURED, ffn=1024)
ORIGIN = Origin("H200", "18 NVLinks", "abc")


def counts(trial: Trial) -> list[tuple[int, int]]:
    return [split[:2] for split in trial.cta_split]


class Tuner:
    """Returns a split of its own, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[LayerShape, bool]] = []
        self.tried = Trial(candidates(choose_split(OTHER), OTHER)["push"][0], num_tokens=16384)

    def trial(self, shape: LayerShape, has_backward: bool) -> Trial:
        self.asked.append((shape, has_backward))
        return self.tried


@pytest.fixture
def in_table() -> CtaSplit:
    return candidates(choose_split(MEASURED), MEASURED)["pull_grad"][0]


@pytest.fixture
def table(tmp_path: Path, in_table: CtaSplit) -> TuningTable:
    write(tmp_path / "table.json", MEASURED, ORIGIN, in_table)
    return TuningTable(read(tmp_path / "table.json"))


def test_table_before_cost_model(table: TuningTable, in_table: CtaSplit) -> None:
    policy = SplitPolicy(ORIGIN, table)
    expected = [split[:2] for split in in_table]
    for has_backward in (False, True):
        trial = policy.choose(MEASURED, has_backward)
        assert counts(trial) == expected != counts(Trial(choose_split(MEASURED)))
        assert not trial.samples
        assert policy.choose(OTHER, has_backward) == Trial(choose_split(OTHER))
    elsewhere = SplitPolicy(ORIGIN._replace(fingerprint="other"), table)
    assert elsewhere.choose(MEASURED, True) == Trial(choose_split(MEASURED))
    assert SplitPolicy(ORIGIN).choose(MEASURED, True) == Trial(choose_split(MEASURED))


def test_tuner_tries_what_the_table_does_not_have(table: TuningTable, in_table: CtaSplit) -> None:
    tuner = Tuner()
    policy = SplitPolicy(ORIGIN, table, tuner)
    assert counts(policy.choose(MEASURED, True)) == [split[:2] for split in in_table]
    assert tuner.asked == []
    assert policy.choose(OTHER, True) is tuner.tried
    assert policy.choose(OTHER, False) is tuner.tried
    assert tuner.asked == [(OTHER, True), (OTHER, False)]


def test_pinned_split_is_every_layers(table: TuningTable) -> None:
    tuner = Tuner()
    policy = SplitPolicy(ORIGIN, table, tuner)
    policy.pinned = pinned = choose_split(replace(MEASURED, num_tokens=(64,) * 2))
    for shape in (MEASURED, OTHER):
        assert policy.choose(shape, True) == Trial(pinned)
    assert tuner.asked == []
    policy.pinned = None
    assert policy.choose(OTHER, True) is tuner.tried


def test_cost_model_is_asked_once_for_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def choose(shape: LayerShape) -> CtaSplit:
        asked.append(shape)
        return choose_split(shape)

    monkeypatch.setattr(policy_module, "choose_split", choose)
    policy = SplitPolicy(ORIGIN)
    for _ in range(3):
        policy.choose(MEASURED, True)
        policy.choose(OTHER, False)
    assert asked == [MEASURED, OTHER]
