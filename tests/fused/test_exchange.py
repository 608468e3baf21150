# SPDX-License-Identifier: Apache-2.0
"""The fused path between ranks: on virtual ranks of one GPU, on two GPUs, and its agreements."""

from __future__ import annotations

import ctypes
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from distributed import World
from experts_zoo import randomize
from mlp_forms import BF16, FORMS, FP16
from parity import build, named_grads, oracle, run
from tolerance import ERROR_RATIO, assert_close, relative_error
from torch.utils.checkpoint import checkpoint
from virtual_ranks import NUM_SMS, VirtualGroup, both_ways

from comet_ds import MoE
from comet_ds.fused import call as fused_call
from comet_ds.fused.call import CallSizes, PreparedCall, max_rows, plan_of
from comet_ds.fused.peer.exchange import (
    TABLES,
    CallShape,
    Exchange,
    ExposureMeter,
    _why_not_connected,
    exchange_of,
)
from comet_ds.fused.peer.host_status import HostStatusExchange, RankStatus
from comet_ds.kernels import load_kernels
from comet_ds.tuning.cost_model import choose_split
from comet_ds.tuning.online import FINAL_SAMPLES, SAMPLES, WARM_UP
from comet_ds.tuning.table import candidates, read
from comet_ds.validation import InputRules

OK = (InputRules.OK, 0)
# Experts, k, hidden, ffn: no multiples of a tile, no powers of two, few and many routes.
SHAPES = [(8, 2, 128, 192), (24, 6, 200, 136), (8, 1, 72, 320), (16, 3, 1032, 72)]


def case(num_tokens: list[int], hidden: int, dtype: torch.dtype) -> tuple[list, list]:
    torch.manual_seed(5)
    draws = [torch.randn(2, count, hidden, device="cuda").to(dtype) for count in num_tokens]
    return [d[0] for d in draws], [d[1] for d in draws]


def options_for(shape: tuple[int, ...], form: str, dtype: torch.dtype) -> dict:
    num_experts, k, hidden, ffn = shape
    expert = FORMS[form](hidden, ffn)
    return dict(expert=expert, num_experts=num_experts, k=k, dtype=dtype, drop_tokens=False)


def all_experts(shape: tuple[int, ...], form: str, dtype: torch.dtype) -> list:
    """Return the experts of all ranks, in fp64."""
    _, _, hidden, ffn = shape
    make: Callable = FORMS[form]
    return [randomize(make(hidden, ffn), i).to("cuda", dtype).double() for i in range(shape[0])]


def expert_grads(results: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    found = [
        t.double().flatten() for r in results for n, t in r.items() if "deepspeed_experts" in n
    ]
    return torch.cat(found)


def run_deepspeed(x: torch.Tensor, grad: torch.Tensor, options: dict) -> dict[str, torch.Tensor]:
    """Run DeepSpeed's layer with all experts; it takes no fewer tokens than min_capacity."""
    return run(build(DeepSpeedMoE, 0, device="cuda", min_capacity=0, **options), x, grad)


def check_against_fp64(
    num_ranks: int, num_tokens: list[int], shape: tuple[int, ...], form: str, dtype: torch.dtype
) -> None:
    """Errors are at most 1.5 times those of DeepSpeed's layer with all experts, rank by rank.

    The bits are the same in every run, and however tokens come.
    """
    options = options_for(shape, form, dtype)
    group = VirtualGroup(num_ranks, comet_ds={"exact_gate": True}, **options)
    xs, grads = case(num_tokens, shape[2], dtype)
    got = group.run(xs, grads)
    again = [group.run(xs, grads)]
    for cta_split in both_ways(group.layers[0].deepspeed_moe.fused.cta_split):
        for exchange in group.exchanges:
            exchange.cta_split = cta_split
        again.append(group.run(xs, grads))
    theirs, truths = [], []
    where = f"{form} {shape} {num_tokens} {dtype}"
    for rank, (ours, *same) in enumerate(zip(got, *again, strict=True)):
        for other in same:
            assert all(torch.equal(ours[what], other[what]) for what in ours), f"{where}: not same"
        if num_tokens[rank] == 0:
            continue
        x, grad = xs[rank], grads[rank]
        truth = oracle(group.layers[rank], x, grad, all_experts(shape, form, dtype))
        deepspeed = run_deepspeed(x, grad, options)
        truths.append(truth)
        theirs.append(deepspeed)
        for what in ("output", "grad of x"):
            error, limit = (relative_error(r[what], truth[what]) for r in (ours, deepspeed))
            assert error <= ERROR_RATIO * limit, f"{where}: {what}: {error} > 1.5 * {limit}"
        assert_close(ours["l_aux"], deepspeed["l_aux"], f"{where}: l_aux")
        if num_tokens[rank] > 8 and shape[1] < shape[0]:
            gates = [r["grad of deepspeed_moe.gate.wg.weight"] for r in (ours, deepspeed)]
            error, limit = (relative_error(g, truth["grad of gate"]) for g in gates)
            assert error <= ERROR_RATIO * limit, f"{where}: gate: {error} > 1.5 * {limit}"
    truth = sum(torch.cat([g.flatten() for g in t["grads of experts"]]) for t in truths)
    limit = relative_error(sum(expert_grads([r]) for r in theirs), truth)
    error = relative_error(expert_grads(got), truth)
    assert error <= ERROR_RATIO * limit, f"{where}: grads of experts: {error} > 1.5 * {limit}"


@pytest.mark.gpu(1)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_virtual_ranks(num_ranks: int, shape: tuple[int, ...]) -> None:
    counts = ([129] * 8, [63, 1, 7, 300, 0, 129, 64, 5])
    for num_tokens in counts:
        check_against_fp64(num_ranks, num_tokens[:num_ranks], shape, "swiglu", BF16)


@pytest.mark.gpu(1)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("form", ["gelu with biases", "swiglu with biases", "relu with biases"])
def test_virtual_ranks_forms(form: str, dtype: torch.dtype) -> None:
    check_against_fp64(2, [200, 129], (8, 2, 128, 192), form, dtype)


@pytest.mark.gpu(1)
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_virtual_ranks_drop_tokens(num_ranks: int, k: int) -> None:
    """Same routes and result as a layer with all experts; NaN in one call, not in the next."""
    shape = (8, k, 128, 192)
    options = {**options_for(shape, "swiglu", BF16), "drop_tokens": True, "capacity_factor": 0.6}
    group = VirtualGroup(num_ranks, **options)
    alone = build(MoE, 0, device="cuda", comet_ds={"path": "fused"}, **options)
    xs, grads = case([300, 129, 63, 64][:num_ranks], 128, BF16)
    spoilt = [x.clone() for x in xs]
    spoilt[1][5] = float("nan")
    first = group.run(xs, grads)
    assert group.run(spoilt, grads)[1]["output"].isnan().any()
    got = group.run(xs, grads)
    expected = [run(alone, x, grad) for x, grad in zip(xs, grads, strict=True)]
    for ours, same, theirs in zip(got, first, expected, strict=True):
        for what in ("output", "l_aux", "grad of x", "grad of deepspeed_moe.gate.wg.weight"):
            assert torch.equal(ours[what], same[what])
            assert_close(ours[what], theirs[what], what)
    total = sum(expert_grads([r]) for r in expected)
    assert relative_error(expert_grads(got), total) < 1e-2


@pytest.mark.gpu(1)
def test_virtual_ranks_skewed() -> None:
    """All tokens of all ranks to the experts of one."""
    shape = (8, 2, 128, 192)
    options = options_for(shape, "swiglu", BF16) | {"top2_2nd_expert_sampling": False}
    group = VirtualGroup(4, **options)
    alone = build(MoE, 0, device="cuda", comet_ds={"path": "fused"}, **options)
    xs, grads = case([129, 300, 63, 64], 128, BF16)
    for layer in (alone, *group.layers):
        with torch.no_grad():
            layer.deepspeed_moe.gate.wg.weight[4:6].fill_(1.0)
            layer.deepspeed_moe.gate.wg.weight[:4].fill_(-1.0)
            layer.deepspeed_moe.gate.wg.weight[6:].fill_(-1.0)
    xs = [x.abs() for x in xs]
    got = group.run(xs, grads)
    for x, grad, ours in zip(xs, grads, got, strict=True):
        theirs = run(alone, x, grad)
        for what in ("output", "grad of x"):
            assert_close(ours[what], theirs[what], what)
    ids = group.layers[0].deepspeed_moe.routing.topk_ids
    assert ids.min() >= 4 and ids.max() <= 5


def spread_routing(
    layers: list[MoE], xs: list[torch.Tensor], variation: float
) -> list[torch.Tensor]:
    """Make experts differ in popularity, by a coefficient of variation of their tokens.

    Returns inputs like ``xs``; changes the gates' weights, to the same on all layers.
    """
    xs = [x.clone() for x in xs]
    for x in xs:
        x[:, 0] = 1.0
    weights = [layer.deepspeed_moe.gate.wg.weight for layer in layers]
    first, slope = weights[0].detach().clone(), torch.linspace(-1, 1, len(weights[0]))
    for step in range(500):
        first[:, 0] = 0.01 * step * slope.to(first)
        with torch.no_grad():
            for weight in weights:
                weight.copy_(first)
            logits = torch.cat(xs).float() @ first.float().t()
        top_k = layers[0].deepspeed_moe.gate.k
        counts = torch.bincount(logits.topk(top_k).indices.flatten(), minlength=len(first)).float()
        found = (counts.std(correction=0) / counts.mean()).item()
        if found >= variation:
            assert found < 1.1 * variation, f"{found}, not {variation}"
            return xs
    raise AssertionError(f"no gate gives a variation of {variation}")


@pytest.mark.gpu(1)
@pytest.mark.parametrize("variation", [0.26, 0.40])
def test_virtual_ranks_uneven_experts(variation: float) -> None:
    options = options_for((16, 4, 128, 192), "swiglu", BF16)
    group = VirtualGroup(4, **options)
    alone = build(MoE, 0, device="cuda", comet_ds={"path": "fused"}, **options)
    xs, grads = case([400, 300, 630, 64], 128, BF16)
    xs = spread_routing([alone, *group.layers], xs, variation)
    got = group.run(xs, grads)
    for x, grad, ours in zip(xs, grads, got, strict=True):
        theirs = run(alone, x, grad)
        for what in ("output", "grad of x", "grad of deepspeed_moe.gate.wg.weight"):
            assert_close(ours[what], theirs[what], what)


@pytest.mark.gpu(1)
def test_exposure() -> None:
    """What communication takes from computation is measured where someone asks, and nothing else
    changes."""
    group = VirtualGroup(2, **options_for((8, 2, 1024, 256), "swiglu", BF16))
    xs, grads = case([700, 600], 1024, BF16)
    expected = group.run(xs, grads)
    fused = [layer.deepspeed_moe.fused for layer in group.layers]
    for one in fused:
        one.meter = ExposureMeter(torch.device("cuda"))
    got = [group.run(xs, grads) for _ in range(2)][1]
    for rank, one in enumerate(fused):
        assert all(torch.equal(got[rank][what], value) for what, value in expected[rank].items())
        assert one.meter._num_calls == [2, 2]
        assert all(communicating > 0 for communicating, _ in one.meter._exposures.tolist())
        found = one.meter.read(NUM_SMS)
        assert list(found) == ["forward", "backward"] and all(0 < ms < 1e3 for ms in found.values())


@pytest.mark.gpu(1)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_cta_split_computes_the_same(num_ranks: int) -> None:
    """Whatever a tuner may choose is compiled and runs, to the same bits."""
    group = VirtualGroup(num_ranks, **options_for((16, 2, 1024, 256), "swiglu", BF16))
    xs, grads = case([700, 600, 0, 500][:num_ranks], 1024, BF16)
    expected = group.run(xs, grads)
    shape = group.layers[0].deepspeed_moe.fused.shape
    default = choose_split(shape)
    cta_splits = [d for found in candidates(default, shape).values() for d in found]
    splits = range(16 // num_ranks + 1)
    cta_splits += [
        default._replace(push=default.push._replace(num_split_experts=n)) for n in splits
    ]
    cta_splits += both_ways(default)
    assert len(cta_splits) >= 16
    for cta_split in cta_splits:
        for exchange in group.exchanges:
            exchange.cta_split = cta_split
        got = group.run(xs, grads)
        used = [layer.deepspeed_moe.fused.cta_split for layer in group.layers]
        assert used == [cta_split] * num_ranks
        for ours, before in zip(got, expected, strict=True):
            different = [
                what for what, value in before.items() if not torch.equal(ours[what], value)
            ]
            assert not different, f"{cta_split}: {different}"


@pytest.mark.gpu(1)
def test_absent_rank_is_named() -> None:
    """A rank that never comes is an error within the deadline; in a process of its own, since the
    GPU's context does not survive it."""
    script = """
import sys, torch
sys.path.insert(0, "tests")
from experts_zoo import GatedMLP
from virtual_ranks import VirtualGroup
group = VirtualGroup(3, timeout_s=2, expert=GatedMLP(64, 96), num_experts=6, dtype=torch.bfloat16)
xs = [torch.randn(16, 64, device="cuda", dtype=torch.bfloat16)] * 3
group.load(xs, xs)
group.forward(xs, ranks=[0, 2])
torch.cuda.synchronize()
"""
    root = Path(__file__).parent.parent.parent
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=200
    )
    assert done.returncode != 0 and time.monotonic() - start < 150
    # The first that gives up ends the others, which share its GPU here.
    assert "of the expert parallel group waited 2 s for rank 1" in done.stdout + done.stderr
    assert 'its flag for "tokens" is 0, not 1' in done.stdout + done.stderr


# --- agreements between processes, no GPU --------------------------------------------------------


def check_roll_call(rank: int, size: int) -> None:
    statuses = HostStatusExchange(torch.distributed.group.WORLD, 20)
    for number in range(300):
        mine = RankStatus(1000 * rank + number, number % 3 > rank % 2, OK, (number + rank) % 16)
        if rank == number % size and number % 50 == 0:
            time.sleep(0.02)
        answers = statuses.exchange(mine)
        assert answers[rank] == mine
        assert [a.num_tokens for a in answers] == [1000 * r + number for r in range(size)]
        assert [a.can_fuse for a in answers] == [number % 3 > r % 2 for r in range(size)]
        assert [a.needs for a in answers] == [(number + r) % 16 for r in range(size)]
    fault = (InputRules.DTYPE, -1) if rank == 1 else OK
    answer = statuses.exchange(RankStatus(0, False, fault, 15))[1]
    assert (answer.fault, answer.needs) == ((InputRules.DTYPE, -1), 15)


@pytest.mark.parametrize("size", [2, 4])
def test_roll_call(world, size: int) -> None:
    world(size).run(check_roll_call)


def error_of(statuses: HostStatusExchange) -> str:
    """Return what the next call raises."""
    try:
        statuses.exchange(RankStatus(1, True, OK))
    except RuntimeError as error:
        return str(error)
    return "no error"


def check_late(rank: int, size: int) -> str:
    statuses = HostStatusExchange(torch.distributed.group.WORLD, 1)
    if rank == 0:
        return error_of(statuses)
    time.sleep(3)
    return ""


def test_late_rank_is_named(world) -> None:
    answers = world(2).run(check_late)
    assert "rank 1 of the expert parallel group did not come to its forward number 1" in answers[0]
    assert "within 1 s" in answers[0]


def check_ended(rank: int, size: int) -> str:
    statuses = HostStatusExchange(torch.distributed.group.WORLD, 100)
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    statuses._processes[1 - rank] = child.pid  # a process that has ended
    return error_of(statuses) if rank == 0 else ""


def test_ended_process_is_named(world) -> None:
    answers = world(2).run(check_ended)
    assert answers[0] == "rank 1 of the expert parallel group: its process has ended"


def check_killed_before_call(rank: int, size: int) -> None:
    statuses = HostStatusExchange(torch.distributed.group.WORLD, 100)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    statuses.exchange(RankStatus(1, True, OK))


def assert_killed_rank_is_named(backend: str, check: Callable) -> None:
    """Rank 1 kills itself in ``check``: rank 0 raises in time and says so; no process is left."""
    world = World(2, backend)
    start = time.monotonic()
    with pytest.raises(AssertionError) as failure:
        world.run(check, timeout=60)
    assert time.monotonic() - start < 60
    of_rank_0 = "rank 1 of the expert parallel group: its process has ended"
    assert of_rank_0 in str(failure.value)


def test_killed_rank_is_named_by_the_roll_call() -> None:
    assert_killed_rank_is_named("gloo", check_killed_before_call)


def check_killed_in_construction(rank: int, size: int) -> None:
    def die(*args: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    torch.distributed.broadcast_object_list = die  # the page exists, the others have not opened it
    HostStatusExchange(torch.distributed.group.WORLD, 100)


def test_killed_ranks_leave_no_shared_memory() -> None:
    """Also where a rank is killed in between creating the page and all having it open."""

    def of_ours() -> set[Path]:
        folders = Path("/dev/shm"), Path(tempfile.gettempdir())
        return {path for folder in folders for path in folder.glob("comet_ds_*")}

    before = of_ours()
    with pytest.raises(AssertionError, match="its process has ended"):
        World(2, "gloo").run(check_killed_in_construction, timeout=60)
    assert of_ours() <= before, "left behind"


def check_named_page(rank: int, size: int) -> list[int]:
    make = HostStatusExchange._make_page

    def make_unreachable(has_name: bool) -> tuple[int, str]:
        page, path = make(has_name)
        return page, path if has_name else "/nowhere/page"

    HostStatusExchange._make_page = staticmethod(make_unreachable)
    try:
        statuses = HostStatusExchange(torch.distributed.group.WORLD, 20)
        return [answer.num_tokens for answer in statuses.exchange(RankStatus(7 + rank, True, OK))]
    finally:
        HostStatusExchange._make_page = staticmethod(make)


def test_a_file_where_memory_without_a_name_is_not_reached(world) -> None:
    before = set(Path("/dev/shm").glob("comet_ds_*"))
    assert world(2).run(check_named_page) == [[7, 8], [7, 8]]
    assert set(Path("/dev/shm").glob("comet_ds_*")) <= before


@pytest.mark.parametrize("is_pushed", [False, True])
def test_parts_of_the_block(is_pushed: bool) -> None:
    """Parts are aligned, do not overlap, and hold what the largest rank brings."""
    call = CallShape((100, 0, 333), top_k=3, num_experts=12, token_bytes=400, is_pushed=is_pushed)
    lasting, incoming, place_bytes = Exchange._lay_out(call)
    assert lasting.offsets["flags"] == 0  # stays where it is for every shape
    places = {
        "kept_counts": 12 * 4,
        "topk_ids": 333 * 3 * 8,
        "topk_weights": 333 * 3 * 4,
        "ranks": 333 * 3 * 4,
        "tokens": 333 * 400,
    }
    assert all(size <= place_bytes[name] < size + 256 for name, size in places.items())
    needs = {name: 2 * place_bytes[name] for name in places}
    if not is_pushed:
        needs["tokens"] = place_bytes["tokens"]
    others = {"flags": 3 * 8, "grad_weights": 333 * 3 * 4, "slots": 2 * 333 * 400}
    for found, expected in ((lasting, others), (incoming, needs)):
        assert set(found.offsets) == set(expected)
        assert all(offset % 256 == 0 for offset in found.offsets.values())
        ends = sorted((at, at + expected[name]) for name, at in found.offsets.items())
        ends.append((found.size, found.size))
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))


@pytest.mark.parametrize("is_pushed", [False, True])
@pytest.mark.parametrize("num_tokens", [(5, 5), (3, 8, 0), (2, 0, 7, 1, 1, 6, 3, 4)], ids=str)
def test_what_ranks_exchange_arrives(num_tokens: tuple[int, ...], is_pushed: bool) -> None:
    """Every rank finds all others' tables and tokens where it reads them."""
    blocks = [torch.zeros(2**15, dtype=torch.uint8) for _ in num_tokens]
    tables = [
        {name: torch.full((n, 2), 10 * rank + i).byte() for i, name in enumerate(TABLES)}
        for rank, n in enumerate(num_tokens)
    ]
    tokens = [torch.full((n, 16), 100 + rank).byte() for rank, n in enumerate(num_tokens)]
    call = CallShape(num_tokens, 2, num_experts=len(blocks), token_bytes=16, is_pushed=is_pushed)
    found = []
    for rank, block in enumerate(blocks):
        where = {"rank": rank, "block": block, "addresses": [b.data_ptr() for b in blocks]}
        memory = SimpleNamespace(reserve=lambda size: None, is_captured=False, **where)
        found.append(exchange_over(memory).places(call))
    for rank, places in enumerate(found):
        for i in range(len(blocks) - 1):
            for name, table in tables[rank].items():
                ctypes.memmove(places[name][i], table.data_ptr(), table.numel())
            if is_pushed:
                ctypes.memmove(places["tokens"][i], tokens[rank].data_ptr(), tokens[rank].numel())
        if not is_pushed:
            size = tokens[rank].numel()
            ctypes.memmove(places["published"], tokens[rank].data_ptr(), size)
    for rank, places in enumerate(found):
        for other, sources in enumerate(places["sources"]):
            for name, address in zip((*TABLES, "tokens"), sources, strict=False):
                if other == rank:
                    assert address == 0, f"{name} of rank {rank} itself"
                    continue
                sent = tokens[other] if name == "tokens" else tables[other][name]
                expected = bytes(sent.flatten().tolist())
                got = ctypes.string_at(address, len(expected))
                assert got == expected, f"{name} of rank {other} at {rank}"


def exchange_over(memory: Any) -> Exchange:
    """Return an exchange that only lays out memory."""
    exchange = Exchange.__new__(Exchange)
    exchange.memory, exchange._used, exchange._parts = memory, [0, 0], Exchange._lay_out
    exchange.streams = SimpleNamespace(generation=0, is_captured=False)
    exchange.has_copy_engines, exchange.timeout_ns = True, 1
    exchange._epoch = exchange.late = torch.zeros(1)
    return exchange


class GrowingMemory:
    """``PeerMemory`` of two ranks that only knows its size."""

    rank, is_captured = 0, False
    addresses = (0, 10**12)
    block = torch.empty(0, device="meta")

    def reserve(self, num_bytes: int) -> None:
        if num_bytes > 2**30:
            raise RuntimeError("no symmetric memory")
        if num_bytes > self.block.numel():
            self.block = torch.empty(num_bytes, dtype=torch.uint8, device="meta")


def test_what_comes_meets_nothing_else() -> None:
    """What comes for one call can come while its receiver still reads the call before's sums."""
    exchange = exchange_over(GrowingMemory())
    calls = [
        CallShape((count, count // 2, 1, 0), k, 16, token_bytes, is_pushed)
        for count, token_bytes in ((64, 4096), (3000, 128), (700, 1024), (1, 16), (2000, 4096))
        for k, is_pushed in ((8, False), (1, True), (8, True))
    ]
    for before, call in itertools.pairwise([*calls, *calls[::-1]]):
        exchange.parts(before)
        block = exchange.memory.block
        addresses = exchange.parts(call).addresses
        first = min(addresses[name][0] for name in (*TABLES, "tokens"))
        lasting, incoming, _ = Exchange._lay_out(call)
        assert lasting.size <= first <= exchange.memory.block.numel() - incoming.size
        assert exchange.memory.block is not block or first >= Exchange._lay_out(before)[0].size


def test_backward_notices_that_the_memory_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another layer may let the memory grow between a layer's forward and its backward."""
    exchange = exchange_over(GrowingMemory())
    call = CallShape((64, 64), 2, 8, token_bytes=4096, is_pushed=True)
    exchange.parts(call)
    parts = {"weights": "w", "sizes": "s", "cta_split": "d"}
    generation = exchange.generation
    launches = SimpleNamespace(generation=generation)
    found = PreparedCall(launches, max_rows=0, exchange=exchange, **parts)
    exchange.parts(call)
    assert found.current() is found
    monkeypatch.setattr(fused_call, "prepare_call", lambda *arguments: arguments)
    exchange.parts(replace(call, num_tokens=(9000, 64)))
    assert exchange.generation > generation
    assert found.current() == ("w", "s", exchange, "d")


def test_too_large_a_call_leaves_the_memory_usable() -> None:
    exchange = exchange_over(GrowingMemory())
    call = CallShape((64, 64), 2, 8, token_bytes=4096, is_pushed=True)
    before = exchange.parts(call)
    with pytest.raises(RuntimeError, match="no symmetric memory"):
        exchange.parts(replace(call, num_tokens=(10**6, 64)))
    assert exchange.parts(call) == before


@pytest.mark.parametrize("num_experts", [1, 4, 8])
@pytest.mark.parametrize("capacity", [None, 5, 40, 1000])
def test_max_rows(num_experts: int, capacity: int | None) -> None:
    """No routing needs more rows, and the bound is a number of blocks."""
    generator = torch.Generator().manual_seed(3)
    for top_k in (1, 2, 3):
        num_tokens = (37, 0, 260)
        capacities = None if capacity is None else (capacity,) * 3
        sizes = CallSizes(num_tokens, capacities, top_k, 3 * num_experts)
        bound = max_rows(sizes, num_experts, 128)
        assert bound % 128 == 0 and bound > 0
        for skew in (0.0, 5.0):
            rows = torch.zeros(num_experts, dtype=torch.int64)
            for count in num_tokens:
                scores = torch.rand(count, num_experts, generator=generator)
                scores[:, 0] += skew
                chosen = scores.topk(min(top_k, num_experts), dim=1).indices
                counts = torch.bincount(chosen.flatten(), minlength=num_experts)
                rows += counts if capacity is None else counts.clamp(max=capacity)
            assert ((rows + 127) // 128 * 128).sum() <= bound


FACTS = {"rank": 0, "host": ("a", "1"), "device": "x", "model": "H200, 132 SMs"}
FACTS |= {"out of reach": ["z"], "reason": None}


@pytest.mark.parametrize(
    "other, reason",
    [
        ({"rank": 1, "device": "y"}, None),
        ({"rank": 1}, "must have a GPU each"),
        ({"rank": 1, "device": "z"}, "GPU of rank 0 cannot address the memory of rank 1's"),
        (
            {"rank": 1, "device": "y", "host": ("b", "2")},
            "rank 0 has ('a', '1'), rank 1 ('b', '2')",
        ),
        (
            {"rank": 1, "device": "y", "model": "H100, 114 SMs"},
            "rank 0 has H200, 132 SMs, rank 1 H100, 114 SMs",
        ),
        ({"rank": 1, "device": "y", "reason": "it has no kernels: no nvcc"}, "rank 1: it has no"),
    ],
)
def test_why_not_connected(other: dict, reason: str | None) -> None:
    found = _why_not_connected([FACTS, FACTS | other], 32)
    assert found is None if reason is None else reason in found
    assert "at most 1 ranks" in _why_not_connected([FACTS, FACTS | {"device": "y"}], 1)


# --- two GPUs ------------------------------------------------------------------------------------


def check_two_ranks(rank: int, size: int, num_tokens: list[int], shape: tuple[int, ...]) -> None:
    """As close to fp64 as DeepSpeed's layer; the fused path runs, and repeats itself."""
    options = options_for(shape, "swiglu", BF16) | {"top2_2nd_expert_sampling": False}
    block = {"path": "fused", "exact_gate": True}
    parallel = dict(ep_size=size, parallel=True, device="cuda")
    layer = build(MoE, rank, comet_ds=block, **parallel, **options)
    xs, grads = case(num_tokens, shape[2], BF16)
    got = run(layer, xs[rank], grads[rank])
    assert layer.deepspeed_moe.path == "fused"
    exchange = exchange_of(layer.deepspeed_moe.ep_group)
    for cta_split in (None, *both_ways(layer.deepspeed_moe.fused.cta_split)):
        exchange.cta_split = cta_split
        again = run(layer, xs[rank], grads[rank])
        assert all(torch.equal(again[what], value) for what, value in got.items()), f"{cta_split}"
    exchange.cta_split = None
    truth = oracle(layer, xs[rank], grads[rank], all_experts(shape, "swiglu", BF16))
    if num_tokens[rank] > 0:
        theirs = run_deepspeed(xs[rank], grads[rank], options)
        for what in ("output", "grad of x"):
            error, limit = (relative_error(r[what], truth[what]) for r in (got, theirs))
            assert error <= ERROR_RATIO * limit, f"{num_tokens}: {what}: {error} > 1.5 * {limit}"
    other = build(MoE, rank, comet_ds={**block, "path": "pipelined"}, **parallel, **options)
    for what, value in run(other, xs[rank], grads[rank]).items():
        assert_close(got[what], value, f"{num_tokens}: {what}")


@pytest.mark.gpu(2)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_two_ranks_fused(world, shape: tuple[int, ...]) -> None:
    for num_tokens in ([129, 129], [1, 300], [0, 63], [0, 0]):
        world(2, "nccl").run(check_two_ranks, num_tokens, shape)


def check_many_calls(rank: int, size: int) -> None:
    """A thousand calls of two layers with one memory: sizes, routing and how tokens come change,
    nothing waits."""
    layers = []
    for hidden in (64, 200):
        options = options_for((8, 4, hidden, 96), "swiglu", BF16) | {"drop_tokens": True}
        block = {"path": "fused"}
        layers.append(
            build(MoE, rank, ep_size=size, parallel=True, device="cuda", comet_ds=block, **options)
        )
    draws = [case([300 + 17 * (i + r) for r in range(size)], 200, BF16) for i in range(5)]
    results: dict[tuple[int, int], dict] = {}
    for step in range(500):
        xs, grads = draws[step % 5]
        for i, layer in enumerate(layers):
            width = (64, 200)[i]
            x, grad = (t[rank][:, :width].contiguous() for t in (xs, grads))
            if step == 10:
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            result = run(layer, x, grad)
            exchange = exchange_of(layer.deepspeed_moe.ep_group)
            exchange.cta_split = both_ways(layer.deepspeed_moe.fused.cta_split)[step % 3 % 2]
            torch.cuda.set_sync_debug_mode("default")
            first = results.setdefault((step % 5, i), result)
            assert all(torch.equal(first[what], value) for what, value in result.items())


@pytest.mark.gpu(2)
def test_many_calls(world) -> None:
    world(2, "nccl").run(check_many_calls)


def pinned(
    rank: int, ep_size: int, shape: tuple[int, ...] = (8, 2, 128, 192), **options: Any
) -> MoE:
    """Build a layer pinned to the fused path, whose routing draws nothing."""
    fixed = {"top2_2nd_expert_sampling": False, "parallel": True, "device": "cuda"}
    options = options_for(shape, "swiglu", BF16) | fixed | options
    return build(MoE, rank, ep_size=ep_size, **{"comet_ds": {"path": "fused"}} | options)


def check_growth(rank: int, size: int) -> None:
    """The group's memory grows between calls; what was right before is right after."""
    layer = pinned(rank, size, (8, 2, 1024, 128))
    small, large = (case([count] * size, 1024, BF16) for count in (64, 20000))
    first = run(layer, small[0][rank], small[1][rank])
    before = exchange_of(layer.deepspeed_moe.ep_group).memory.block.numel()
    run(layer, large[0][rank], large[1][rank])
    assert exchange_of(layer.deepspeed_moe.ep_group).memory.block.numel() > before
    again = run(layer, small[0][rank], small[1][rank])
    assert all(torch.equal(first[what], value) for what, value in again.items())


@pytest.mark.gpu(2)
def test_growing_memory(world) -> None:
    world(2, "nccl").run(check_growth)


def check_frozen_and_recomputed(rank: int, size: int) -> None:
    """Without gradients of experts, without any, and with forward run again in backward."""
    layer = pinned(rank, size)
    xs, grads = case([129] * size, 128, BF16)
    expected = run(layer, xs[rank], grads[rank])

    def grad_of_x(forward: Callable) -> torch.Tensor:
        layer.zero_grad()
        x = xs[rank].clone().requires_grad_()
        torch.manual_seed(7)
        output, l_aux, _ = forward(x)
        torch.autograd.backward([output, l_aux], [grads[rank], torch.ones_like(l_aux)])
        return x.grad

    for reentrant in (False, True):
        got = grad_of_x(lambda x, how=reentrant: checkpoint(layer, x, use_reentrant=how))
        assert torch.equal(got, expected["grad of x"]), f"checkpointed, {reentrant=}"
        for name, grad in named_grads(layer).items():
            assert torch.equal(grad, expected[name]), name
    layer.deepspeed_moe.experts.requires_grad_(False)
    assert torch.equal(grad_of_x(layer), expected["grad of x"])
    with torch.no_grad():
        assert torch.equal(layer(xs[rank])[0], expected["output"])


@pytest.mark.gpu(2)
def test_frozen_and_recomputed(world) -> None:
    world(2, "nccl").run(check_frozen_and_recomputed)


def check_graph(rank: int, size: int, way: int) -> None:
    """A captured forward and backward does on new input what the layer does."""
    layer = pinned(rank, size, drop_tokens=True, use_rts=False)
    xs, grads = case([256] * size, 128, BF16)
    x = torch.randn_like(xs[rank]).requires_grad_()
    grad = torch.randn_like(x)

    def step() -> torch.Tensor:
        output, l_aux, _ = layer(x)
        torch.autograd.backward([output, l_aux], [grad, torch.ones_like(l_aux)])
        return output

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        exchange = exchange_of(layer.deepspeed_moe.ep_group)
        exchange.cta_split = both_ways(layer.deepspeed_moe.fused.cta_split)[way]
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    x.grad = None
    layer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()
    with torch.no_grad():
        x.copy_(xs[rank])
        grad.copy_(grads[rank])
    for _ in range(3):
        x.grad.zero_()
        graph.replay()
    torch.cuda.synchronize()
    got = output.clone(), x.grad.clone()
    expected = run(layer, xs[rank], grads[rank])
    assert torch.equal(got[0], expected["output"])
    assert torch.equal(got[1], expected["grad of x"])


@pytest.mark.gpu(2)
@pytest.mark.parametrize("way", [0, 1])
def test_cuda_graph_between_ranks(world, way: int) -> None:
    world(2, "nccl").run(check_graph, way)


def check_refining(rank: int, size: int, folder: str) -> None:
    """A layer measures its CTA splits while it runs; its results are the same throughout."""
    path = Path(folder) / "table.json"
    block = {"path": "fused", "refine": True, "tuning_table": str(path)}
    layer = pinned(rank, size, (8, 2, 1024, 256), comet_ds=block)
    fused = layer.deepspeed_moe.fused
    xs, grads = case([1000] * size, 1024, BF16)
    first, cta_splits = run(layer, xs[rank], grads[rank]), set()
    for _ in range(WARM_UP + 20 * SAMPLES + 2 * FINAL_SAMPLES):
        again = run(layer, xs[rank], grads[rank])
        assert all(torch.equal(first[what], value) for what, value in again.items())
        cta_splits.add(fused.cta_split)
    (tuner,) = exchange_of(layer.deepspeed_moe.ep_group).tuner._tuners.values()
    assert len(cta_splits) > 5 and fused.cta_split == tuner.best
    found: list = [None] * size
    points = [tuple(choice[:2]) for choice in fused.cta_split]
    torch.distributed.all_gather_object(found, points)
    assert found == [points] * size
    assert len(read(path)) == 1


@pytest.mark.gpu(2)
def test_refining(world, tmp_path: Path) -> None:
    world(2, "nccl").run(check_refining, str(tmp_path))


def check_groups(rank: int, size: int) -> None:
    """Two groups of two ranks side by side; each is as a world of its own."""
    shape = (8, 2, 128, 192)
    layer = pinned(rank, 2, shape)
    other = pinned(rank, 2, shape, comet_ds={"path": "pipelined"})
    xs, grads = case([129, 300, 63, 0], 128, BF16)
    for _ in range(3):
        got = run(layer, xs[rank], grads[rank])
    assert layer.deepspeed_moe.path == "fused"
    for what, value in run(other, xs[rank], grads[rank]).items():
        assert_close(got[what], value, what)


@pytest.mark.gpu(4)
def test_groups_side_by_side(world) -> None:
    world(4, "nccl").run(check_groups)


def check_bad_input(rank: int, size: int) -> str:
    options = options_for((8, 2, 64, 96), "swiglu", BF16)
    layer = build(
        MoE, rank, ep_size=size, parallel=True, device="cuda", comet_ds={"path": "fused"}, **options
    )
    x = torch.randn(8, 72 if rank else 64, device="cuda", dtype=BF16)
    try:
        layer(x)
    except ValueError as error:
        layer(torch.randn(8, 64, device="cuda", dtype=BF16))[0].sum().item()
        return str(error)
    return "no error"


@pytest.mark.gpu(2)
def test_bad_input_fused(world) -> None:
    for answer in world(2, "nccl").run(check_bad_input):
        assert "rank 1 of the expert parallel group" in answer
        assert "hidden size 64, got 72" in answer


def check_killed(rank: int, size: int) -> None:
    options = options_for((8, 2, 64, 96), "swiglu", BF16)
    block = {"path": "fused", "timeout_s": 4}
    layer = build(MoE, rank, ep_size=size, parallel=True, device="cuda", comet_ds=block, **options)
    x = torch.randn(64, 64, device="cuda", dtype=BF16)
    layer(x)[0].sum().item()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    for _ in range(3):
        layer(x)[0].sum().item()


@pytest.mark.gpu(2)
def test_killed_rank_is_named() -> None:
    assert_killed_rank_is_named("nccl", check_killed)


@pytest.mark.gpu(1)
@pytest.mark.parametrize(
    "num_ranks, num_split, num_local, top_k",
    [*itertools.product((1, 2, 4), (0, 5, 12), (12,), (3,)), (1, 0, 300, 3), (2, 7, 40, 34)],
)
def test_plan(num_ranks: int, num_split: int, num_local: int, top_k: int) -> None:
    """Own tokens in their rows. Every block once; split experts' own first; in pairs if it can."""
    kernels = load_kernels(torch.device("cuda", 0))
    torch.manual_seed(2)
    block = kernels.row_block
    num_experts = num_local * num_ranks
    tables, counts = [], []
    for rank in range(num_ranks):
        ids = torch.randint(-1, num_experts, (700 + 300 * rank, top_k), device="cuda")
        is_routed = F.one_hot(ids.flatten() + 1, num_experts + 1)
        ranks = (is_routed.cumsum(0) - 1).gather(1, ids.flatten()[:, None] + 1)
        ranks = ranks.int().view_as(ids)
        counts.append(is_routed.sum(0)[1:].int())
        tables.append((ids, torch.rand(ids.shape, device="cuda"), ranks, counts[-1]))
    tokens = torch.randn(tables[0][0].shape[0], 72, dtype=torch.bfloat16, device="cuda")
    num_tokens = [table[0].shape[0] for table in tables]
    size = max_rows(CallSizes(tuple(num_tokens), None, top_k, num_experts), num_local, block)
    # Of rank 0's, the tables are the call's own.
    sources = [
        (*(t.data_ptr() * (rank > 0) for t in tb), 0, 0, 0) for rank, tb in enumerate(tables)
    ]
    call = kernels.LayerCall(
        hidden=72,
        ffn=8,
        num_experts=num_local,
        num_all_experts=num_experts,
        top_k=top_k,
        max_rows=size,
        counts_rows=False,
        num_tokens=num_tokens,
        rank=0,
        num_sms=132,
        is_bfloat16=True,
        is_gated=False,
        activation=0,
        maps=[0, 0, 0],
        biases=[0, 0, 0],
        pull=[2, num_split],
        push=[2, num_split],
        pull_grad=[2, num_split],
        push_grad=[2, num_split],
        sources=sources,
    )
    workspace = torch.full((call.workspace_bytes,), 1, dtype=torch.uint8, device="cuda")
    placed = torch.full((size, 72), torch.nan, dtype=tokens.dtype, device="cuda")
    hidden = torch.empty(size, 8, dtype=tokens.dtype, device="cuda")
    call.forward(
        tokens=tokens,
        **dict(zip(TABLES, tables[0], strict=True)),
        workspace=workspace,
        rows=placed,
        hidden=hidden,
        pre=(),
        results=torch.empty_like(placed),
        output=torch.empty_like(tokens),
        part="plan",
    )
    plan = SimpleNamespace(**plan_of(call, workspace))
    offsets = plan.expert_offsets.tolist()
    is_padding = plan.token_of_row[: offsets[-1]] < 0
    assert is_padding.any() and not placed[: offsets[-1]][is_padding].any()
    row_of_route = plan.row_of_route[: num_tokens[0]]
    token, _ = (has_row := row_of_route >= 0).nonzero(as_tuple=True)
    assert has_row.any() and torch.equal(placed[row_of_route[has_row]], tokens[token])
    assert not plan.counters.any()
    order_idx = 1  # the first splits nothing
    num_blocks = offsets[-1] // block
    order, experts = (
        t[order_idx, :num_blocks].tolist() for t in (plan.block_order, plan.expert_order)
    )
    assert sorted(order) == list(range(num_blocks))
    held = torch.stack(counts)[:, :num_local].cumsum(0).cpu()
    phases, distances = [], []  # of each block, by its farthest rank
    for b, e in zip(order, experts, strict=True):
        assert offsets[e] <= b * block < offsets[e + 1]
        last = min(b * block + block - offsets[e], int(held[-1, e]))
        distance = int((held[:, e] < last).sum())
        assert (int(plan.remote_rows[b]) > 0) == (distance > 0)
        distances.append(distance)
        if num_split == num_local:
            phases.append(distance)
        else:
            phases.append(1 if e >= num_split else 2 * (distance > 0))
    pairs = list(zip(experts[::2], experts[1::2], strict=False))
    in_order = [phases[2 * i] for i, (a, b) in enumerate(pairs) if a == b]
    assert in_order == sorted(in_order)
    segments = Counter(zip(phases, experts, strict=True))
    num_mixed = sum(a != b for a, b in pairs)
    assert num_mixed <= sum(size % 2 for size in segments.values()) / 2
    own, *begins = plan.remote_begin[order_idx].tolist()
    assert own == 0
    for distance, begin in enumerate(begins, 1):
        # As late as it can be in pairs: behind it come those of unsplit experts too.
        assert begin % 2 == 0 and all(d < distance for d in distances[:begin])
        first = distance if num_split == num_local else 1
        assert begin == sum(phase < first for phase in phases) // 2 * 2
