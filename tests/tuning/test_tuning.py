# SPDX-License-Identifier: Apache-2.0
"""CtaSplit points: the cost model's, the table of measured ones, and what is worth measuring."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest

from comet_ds.cli import tune
from comet_ds.tuning.cost_model import CtaSplit, LayerShape, Traffic, choose_split
from comet_ds.tuning.table import (
    VERSION,
    Origin,
    TuningTable,
    candidates,
    default_path,
    is_legal,
    read,
    write,
)

FINE = LayerShape((8192, 8192), 0, 8, 128, 2, 2048, 768, "bfloat16", 132)
WIDE = LayerShape((8192, 8192), 0, 2, 8, 2, 4096, 14336, "bfloat16", 132)
SHAPES = {
    "many small experts": FINE,
    "few large experts": WIDE,
    "one token of two ranks": replace(FINE, num_tokens=(1, 0), hidden=64),
    "few tokens of many ranks": replace(FINE, num_tokens=(64,) * 32),
    "a GPU with few SMs": replace(FINE, num_sms=16, num_tokens=(300,) * 8),
}
WHERE = Origin("H200", "18 NVLinks", "abc")


def test_cost_model() -> None:
    """More communicates where there is more to move and less to compute."""
    traffic = Traffic.expected(FINE)
    assert traffic.rows == 8192 * 4 and 8192 * 0.99 < traffic.tokens < 8192
    fine, wide = choose_split(FINE), choose_split(WIDE)
    assert all(choice.seconds > 0 for choice in (*fine, *wide))
    assert fine.push.num_comm_ctas > wide.push.num_comm_ctas
    assert fine.push_grad.num_comm_ctas > wide.push_grad.num_comm_ctas
    fine_pull, wide_pull = (
        Traffic.expected(shape).pull(2 * 2 * shape.hidden * shape.ffn) for shape in (FINE, WIDE)
    )
    assert fine_pull.num_split_experts / 64 > wide_pull.num_split_experts / 4
    assert fine.pull_grad.num_split_experts >= fine_pull.num_split_experts
    assert (
        fine.push.num_split_experts / 64
        > wide.push.num_split_experts / 4
        > 0
        == fine.push_grad.num_split_experts
    )


def test_tokens_are_sent() -> None:
    """Where the gate takes long enough to hide most of it; all ranks say the same."""
    assert choose_split(FINE).is_pushed and not choose_split(WIDE).is_pushed
    assert not choose_split(replace(FINE, num_tokens=(8192,) * 8)).is_pushed
    for num_tokens in ((16000, 384), (0, 16384), (3, 1), (30000, 30)):
        ranks = [choose_split(replace(FINE, num_tokens=num_tokens, rank=rank)) for rank in (0, 1)]
        assert ranks[0].is_pushed == ranks[1].is_pushed
        assert ranks[0].pull_grad.num_comm_ctas > 0


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_all_choices_are_legal(shape: LayerShape) -> None:
    cta_split = choose_split(shape)
    assert is_legal(cta_split, shape)
    found = candidates(cta_split, shape)
    assert set(found) == set(CtaSplit._fields)
    for field, others in found.items():
        assert cta_split not in others and len(set(others)) == len(others)
        for other in others:
            assert is_legal(other, shape)
            assert other == cta_split._replace(**{field: getattr(other, field)})
    if shape in (FINE, WIDE):
        assert all(len(others) >= 3 for others in found.values())
        assert sum(d.is_pushed for d in (cta_split, *found["pull"])) == 1


def test_illegal_choices() -> None:
    cta_split = choose_split(FINE)
    push, pull = cta_split.push, cta_split.pull_grad
    for wrong in (
        cta_split._replace(push=push._replace(num_comm_ctas=7)),
        cta_split._replace(push=push._replace(num_comm_ctas=0)),
        cta_split._replace(push_grad=cta_split.push_grad._replace(num_comm_ctas=68)),
        cta_split._replace(push=push._replace(num_split_experts=-1)),
        cta_split._replace(push_grad=cta_split.push_grad._replace(num_split_experts=1)),
        cta_split._replace(pull=pull._replace(num_split_experts=65)),
        cta_split._replace(pull=pull._replace(num_comm_ctas=0, num_split_experts=1)),
        cta_split._replace(pull_grad=pull._replace(num_comm_ctas=0, num_split_experts=0)),
    ):
        assert not is_legal(wrong, FINE)


def tuned(shape: LayerShape) -> CtaSplit:
    """Return points that are not the cost model's."""
    return candidates(choose_split(shape), shape)["pull_grad"][0]


def find(path: Path, shape: LayerShape, where: Origin = WHERE) -> CtaSplit | None:
    found = TuningTable(read(path)).find(shape, where)
    return found and CtaSplit(*(choice._replace(seconds=0.0) for choice in found))


def plain(cta_split: CtaSplit) -> CtaSplit:
    return CtaSplit(*(choice._replace(seconds=0.0) for choice in cta_split))


def test_looked_up_without_the_file(tmp_path: Path) -> None:
    """A run reads the table once: every forward may then ask for the nearest of many entries."""
    path = tmp_path / "table.json"
    nearest = candidates(choose_split(FINE), FINE)["push"][0]
    for count in range(100, 4100, 100):
        found = nearest if count == 2000 else tuned(FINE)
        write(path, replace(FINE, num_tokens=(count, count)), WHERE, found)
    table = TuningTable(read(path))
    path.unlink()
    found = table.find(replace(FINE, num_tokens=(2010, 2010)), WHERE)
    assert plain(found) == plain(nearest) != plain(tuned(FINE))


def test_written_is_found(tmp_path: Path) -> None:
    path = tmp_path / "new" / "table.json"
    assert read(path) == [] and find(path, FINE) is None
    write(path, FINE, WHERE, tuned(FINE), 3.5)
    write(path, WIDE, WHERE, tuned(WIDE), 24.0)
    assert find(path, FINE) == plain(tuned(FINE)) and find(path, WIDE) == plain(tuned(WIDE))
    other = candidates(choose_split(FINE), FINE)["push"][0]
    write(path, FINE, WHERE, other, 3.4)
    assert find(path, FINE) == plain(other) and len(read(path)) == 2


def test_only_the_same_layer_and_about_as_many_tokens(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    write(path, FINE, WHERE, tuned(FINE), 3.5)
    write(path, replace(FINE, num_tokens=(2048, 2048)), WHERE, choose_split(FINE), 1.0)
    for count, expected in ((8000, tuned(FINE)), (16384, tuned(FINE)), (2500, choose_split(FINE))):
        assert find(path, replace(FINE, num_tokens=(count, count))) == plain(expected)
    assert find(path, replace(FINE, num_tokens=(5000, 11384))) == plain(tuned(FINE))  # on average
    for other in (
        replace(FINE, num_tokens=(17000, 17000)),
        replace(FINE, num_tokens=(0, 0)),
        replace(FINE, num_tokens=(8192,) * 4),
        replace(FINE, ffn=776),
        replace(FINE, top_k=4),
        replace(FINE, num_ups=1),
        replace(FINE, dtype="float16"),
    ):
        assert find(path, other) is None
    assert find(path, FINE, WHERE._replace(device="H100")) is None
    assert find(path, FINE, WHERE._replace(fingerprint="other")) is None
    assert find(path, FINE, WHERE._replace(link="no NVLink")) is None
    assert find(path, replace(FINE, num_sms=16)) is None  # more CTAs than half of them


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"version": 0, "entries": []}', f'{{"version": {VERSION}}}'],
    ids=["empty", "cut off", "a list", "null", "another version", "no entries"],
)
def test_damaged_file_is_survived_and_kept(tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    assert read(path) == []
    write(path, FINE, WHERE, tuned(FINE), 3.5)
    assert find(path, FINE) == plain(tuned(FINE))
    assert (tmp_path / "table.json.bad").read_text() == text


def test_damaged_entries_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    write(path, FINE, WHERE, tuned(FINE), 3.5)
    (good,) = read(path)
    cta_split = good["cta_split"]
    damaged = [
        {},
        "text",
        {**good, "num_tokens": 0},
        {**good, "num_tokens": "8192"},
        {**good, "key": {**good["key"], "unknown": 1}},
        {**good, "key": {**good["key"], "hidden": [2048]}},
        {**good, "cta_split": {**cta_split, "push": [2]}},
        {**good, "cta_split": {**cta_split, "push": [2.5, 1]}},
        {**good, "cta_split": {"pull": [2, 1]}},
    ]
    path.write_text(json.dumps({"version": VERSION, "entries": [*damaged, good]}))
    assert find(path, FINE) == plain(tuned(FINE))
    path.write_text(json.dumps({"version": VERSION, "entries": damaged}))
    assert find(path, FINE) is None
    write(path, WIDE, WHERE, tuned(WIDE), 24.0)
    assert find(path, WIDE) == plain(tuned(WIDE))
    illegal = {**good, "cta_split": {**cta_split, "push": [131, 1]}}
    path.write_text(json.dumps({"version": VERSION, "entries": [illegal]}))
    assert find(path, FINE) is None


def write_many(path: Path, worker: int) -> None:
    for i in range(10):
        shape = replace(FINE, ffn=8 * (1 + 100 * worker + i))
        write(path, shape, WHERE, choose_split(shape), 1.0)


def test_concurrent_writers_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=write_many, args=(path, i)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert len(read(path)) == 40
    assert not list(tmp_path.glob("table.json.[0-9]*"))


def test_tuning_keeps_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward alone decides for what runs in it, both for the rest; noise changes nothing."""
    wanted = choose_split(FINE)
    for field in ("pull", "push", "pull_grad", "push_grad"):
        wanted = candidates(wanted, FINE)[field][-1]

    def cost(cta_split: CtaSplit, fields: tuple[str, ...]) -> float:
        return 10.0 - sum(getattr(cta_split, f)[:2] == getattr(wanted, f)[:2] for f in fields)

    def times(layer: object, cta_splits: list[CtaSplit], *_: object) -> list[tuple[float, float]]:
        forward = [cost(d, ("pull", "push")) for d in cta_splits]
        backward = [cost(d, ("pull_grad", "push_grad")) for d in cta_splits]
        return [(f, f + b) for f, b in zip(forward, backward, strict=True)]

    monkeypatch.setattr(tune, "time_splits", times)
    best, *times = tune.tune(None, FINE, None, None, 3)
    assert plain(best) == plain(wanted) and times == [16.0, 20.0, 20.0]

    def noise(layer: object, cta_splits: list[CtaSplit], *_: object) -> list[tuple[float, float]]:
        return [(1.0 - 1e-3 * (i > 0), 3.0) for i, _ in enumerate(cta_splits)]

    monkeypatch.setattr(tune, "time_splits", noise)
    assert tune.tune(None, FINE, None, None, 3).cta_split == choose_split(FINE)


def test_default_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_path() == tmp_path / "comet_ds" / "tuning.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_path() == tmp_path / ".cache" / "comet_ds" / "tuning.json"
