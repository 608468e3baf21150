# SPDX-License-Identifier: Apache-2.0
"""The simulator: close to what was measured, and sensible where nothing was."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from comet_ds.bench.shapes import SHAPES, Shape
from comet_ds.cli.simulate import Cluster, _Layer, _pipelined, main, predict
from comet_ds.config import CometConfig
from comet_ds.pipelined import chunks
from comet_ds.pipelined.chunks import ChunkChoice
from comet_ds.ranks.setup import agree_on_largest
from comet_ds.tuning.cost_model import ChunkedLayer
from comet_ds.tuning.hardware import H100, H200

# Device ms of forward and forward + backward, H200s of one host, 8192 tokens a rank.
MEASURED = {
    ("mixtral-8x7b", 2): (8.28, 24.72),
    ("phi-3.5-moe", 2): (3.92, 11.44),
    ("qwen2-moe", 2): (1.07, 3.06),
    ("olmoe", 2): (1.48, 4.23),
    ("qwen3-30b", 2): (1.23, 3.49),
}
# The same of backward alone on four, where forward was measured with another order of results.
MEASURED_BACKWARD = {("mixtral-8x7b", 4): 24.82 - 8.50, ("qwen3-30b", 4): 3.91 - 1.56}
# The same of the pipelined path on two, by the number of chunks.
MEASURED_PIPELINED = {
    ("qwen2-moe", 1): (4.27, 8.68),
    ("qwen2-moe", 2): (5.41, 10.86),
    ("qwen2-moe", 4): (7.76, 14.48),
    ("mixtral-8x7b", 1): (10.86, 27.78),
    ("mixtral-8x7b", 2): (11.29, 28.04),
    ("mixtral-8x7b", 4): (11.36, 28.03),
}


@pytest.mark.parametrize("name, num_ranks", MEASURED)
def test_close_to_measured(name: str, num_ranks: int) -> None:
    found = predict(SHAPES[name], 8192, Cluster(num_ranks))
    assert found.path == "fused"
    expected = MEASURED[name, num_ranks]
    assert (found.forward_ms, found.both_ms) == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("name, num_ranks", MEASURED_BACKWARD)
def test_backward_close_to_measured(name: str, num_ranks: int) -> None:
    found = predict(SHAPES[name], 8192, Cluster(num_ranks))
    backward = found.both_ms - found.forward_ms
    assert backward == pytest.approx(MEASURED_BACKWARD[name, num_ranks], rel=0.15)


@pytest.mark.parametrize("name", SHAPES)
def test_no_prediction_is_below_its_limit(name: str) -> None:
    for num_ranks in (1, 2, 4, 8):
        for domain in (1, 8):
            found = predict(SHAPES[name], 8192, Cluster(num_ranks, domain))
            assert found.path == ("fused" if num_ranks <= domain else "pipelined")
            assert found.forward_ms > found.limit_forward_ms
            assert found.both_ms > found.limit_both_ms
            exposed = found.exposed_forward_ms, found.exposed_both_ms - found.exposed_forward_ms
            assert all((time > 0) == (num_ranks > 1) for time in exposed)


@pytest.mark.parametrize(("name", "num_chunks"), list(MEASURED_PIPELINED))
def test_measured_pipelined(name: str, num_chunks: int) -> None:
    layer = _Layer(SHAPES[name], 8192, Cluster(2, domain=2))
    forward, both = MEASURED_PIPELINED[name, num_chunks]
    _, _, *found, _ = _pipelined(layer, num_chunks)
    assert found[0] * 1e3 == pytest.approx(forward, rel=0.15)
    assert sum(found) * 1e3 == pytest.approx(both, rel=0.15)


def test_clusters() -> None:
    """More ranks, a smaller domain and a slower network expose more; chunks hide."""
    shape = Shape(2048, 1024, 1024, 8)
    times = [predict(shape, 8192, Cluster(w, domain=72)).exposed_both_ms for w in (2, 8, 64)]
    assert times == sorted(times)
    near, far = (predict(shape, 8192, Cluster(64, domain)) for domain in (72, 8))
    assert near.path == "fused" and far.path == "pipelined" and near.both_ms < far.both_ms
    slow = predict(shape, 8192, Cluster(64, 8, nic_bytes_per_s=12.5e9))
    assert slow.exposed_both_ms > far.exposed_both_ms
    assert slow.limit_both_ms > far.limit_both_ms
    wide = predict(Shape(4096, 14336, 1024, 8), 8192, Cluster(64, 8))
    assert 1 < wide.cta_split[0] <= 8
    assert wide.exposed_both_ms / wide.both_ms < far.exposed_both_ms / far.both_ms
    assert predict(shape, 8192, Cluster(1024, 8)).both_ms > far.both_ms


def test_uneven_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="experts must be a multiple of ranks, got 8 and 3"):
        predict(SHAPES["mixtral-8x7b"], 8192, Cluster(3))


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "result.json"
    main(
        ["--shapes", "mixtral-8x7b", "--ep-sizes", "2,3,8", "--domain", "4", "--json", str(output)]
    )
    two, three, eight = capsys.readouterr().out.splitlines()[1:]
    assert "fused" in two and "no even spread of 8 experts" in three and "pipelined" in eight
    records = json.loads(output.read_text())
    assert [r["num_ranks"] for r in records] == [2, 8]
    assert records[0]["both_ms"] == predict(SHAPES["mixtral-8x7b"], 8192, Cluster(2, 4)).both_ms
    main(["--shapes", "mixtral-8x7b", "--ep-sizes", "1,3", "--experts-per-rank", "1"])
    one, three = capsys.readouterr().out.splitlines()[1:]
    assert "1 experts are fewer than top_k" in one and "fused" in three
    with pytest.raises(SystemExit):
        main(["--ep-sizes", "0"])
    assert "--ep-sizes: must be a whole number of at least 1, got '0'" in capsys.readouterr().err


def test_slower_memory_takes_longer(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    arguments = ["--shapes", "qwen3-30b", "--ep-sizes", "2,16", "--json", str(output)]
    times = {}
    for gpu, hardware in (("h200", H200), ("h100", H100)):
        main([*arguments, "--gpu", gpu])
        records = json.loads(output.read_text())
        assert all(r["hardware"] == asdict(hardware) for r in records)
        times[gpu] = [r["both_ms"] for r in records]
    assert all(h100 > h200 for h100, h200 in zip(times["h100"], times["h200"], strict=True))


def test_chunks() -> None:
    """One where little travels or is computed, more where both take long."""

    def best(rows: int, seconds: float, num_ranks: int = 8, domain: int = 8) -> int:
        return ChunkedLayer(rows, 4096, (seconds, 2 * seconds), num_ranks, domain).best()

    assert best(0, 0.0) == best(64, 1e-5) == best(10**6, 0.0) == 1
    assert best(65536, 1e-3) == 1  # the host is no faster
    assert 1 < best(262144, 4e-3) < best(10**6, 5e-3)
    assert best(10**6, 16e-3, 1024) < best(10**6, 16e-3)  # more messages a chunk


def test_chunks_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration's, else those of the largest number of tokens that any rank has."""
    linear = functools.partial(torch.nn.Linear, 2048, 3 * 1024, device="meta")
    experts = torch.nn.ModuleList(linear(dtype=torch.bfloat16) for _ in range(8))

    def num_chunks(device: str, ep_size: int = 8, **options: int) -> int:
        gate = SimpleNamespace(k=8)
        rules = SimpleNamespace(device=torch.device(device), hidden=2048)
        choice = ChunkChoice(CometConfig(**options), ep_size, 64 // ep_size, gate, experts)
        return choice._num_chunks(100, None, rules)

    asked: list[int] = []

    def largest(value: int, group: object, device: torch.device) -> int:
        asked.append(value)
        return {100: 65536}.get(value, value)

    monkeypatch.setattr(chunks, "agree_on_largest", largest)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert num_chunks("cuda", num_chunks=3) == 3 and num_chunks("cuda", ep_size=1) == 1
    assert num_chunks("cpu") == 1 and not asked
    flop = 2 * 8 * 65536 * sum(p.numel() for p in experts[0].parameters())
    seconds = flop / H200.grouped_mm_flops
    best = ChunkedLayer(8 * 65536, 4096, (seconds, 2 * seconds), 8, 8).best()
    assert num_chunks("cuda") == best > 1 and asked == [100, best]


def check_largest(rank: int, size: int) -> None:
    device = torch.device("cpu")
    assert agree_on_largest([5, 900][rank], torch.distributed.group.WORLD, device) == 900


def test_ranks_agree_on_tokens(world) -> None:
    world(2).run(check_largest)
