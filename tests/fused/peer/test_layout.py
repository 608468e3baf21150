# SPDX-License-Identifier: Apache-2.0
"""Where in the ranks' memory the parts of a call lie.

Parts are aligned and apart, every rank finds what the others have sent it, nothing that arrives for
one call lies where a rank still reads the one before, and a call that is too large does no harm.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from comet_ds.fused import call as fused_call
from comet_ds.fused.call import PreparedCall
from comet_ds.fused.peer.exchange import Exchange
from comet_ds.fused.peer.layout import TABLES, CallShape, Parts
from comet_ds.tuning.policy import SplitPolicy
from comet_ds.tuning.table import Origin

ARRIVING = (*TABLES, "tokens")  # written by other ranks, at the end of the block
LASTING = ("flags", "grad_weights", "slots")
MOST_BYTES = 2**30
PUSHED = pytest.mark.parametrize("is_pushed", [True, False], ids=["tokens pushed", "tokens pulled"])


class CountedMemory:
    """``PeerMemory`` of rank 0 that only knows its size, which has a limit."""

    rank, is_captured = 0, False
    addresses = (0, 10**12)  # so that an address in the own block is its offset
    block = torch.empty(0, device="meta")

    def reserve(self, num_bytes: int) -> None:
        if num_bytes > MOST_BYTES:
            raise RuntimeError("no symmetric memory")
        if num_bytes > self.block.numel():
            self.block = torch.empty(num_bytes, dtype=torch.uint8, device="meta")


class HostMemory:
    """``PeerMemory`` of one of several ranks, all in this process."""

    is_captured = False

    def __init__(self, blocks: Sequence[torch.Tensor], rank: int) -> None:
        self.rank, self.block = rank, blocks[rank]
        self.addresses = [block.data_ptr() for block in blocks]

    def reserve(self, num_bytes: int) -> None:
        assert num_bytes <= self.block.numel()


class Kernels:
    """What an exchange needs of the compiled module."""

    class PeerStreams:
        generation, is_captured = 0, False


def exchange_over(memory: CountedMemory | HostMemory) -> Exchange:
    return Exchange(memory, Kernels, SplitPolicy(Origin("a GPU", "a link", "some kernels")))


def spans(call: CallShape, parts: Parts) -> dict[str, tuple[int, int]]:
    """Return where every part begins and ends in rank 0's block."""
    num_tokens, num_ranks = max(call.num_tokens), len(call.num_tokens)
    sizes = {
        "flags": 8 * num_ranks,
        "grad_weights": 4 * num_tokens * call.top_k,
        "slots": min(call.top_k, num_ranks - 1) * num_tokens * call.token_bytes,
        **{name: (num_ranks - 1) * parts.place_bytes[name] for name in ARRIVING},
    }
    if not call.is_pushed:  # the rank's own, once
        sizes["tokens"] = parts.place_bytes["tokens"]
    assert set(parts.addresses) == set(sizes)
    begins = {name: parts.addresses[name][0] for name in sizes}
    return {name: (begin, begin + sizes[name]) for name, begin in begins.items()}


@PUSHED
def test_parts_are_aligned_and_apart(is_pushed: bool) -> None:
    """And have room for what the rank with the most tokens sends."""
    call = CallShape((100, 0, 333), top_k=3, num_experts=12, token_bytes=400, is_pushed=is_pushed)
    exchange = exchange_over(CountedMemory())
    parts = exchange.parts(call)
    sent = {
        "kept_counts": 12 * 4,
        "topk_ids": 333 * 3 * 8,
        "topk_weights": 333 * 3 * 4,
        "slot_in_expert": 333 * 3 * 4,
        "tokens": 333 * 400,
    }
    assert all(size <= parts.place_bytes[name] < size + 256 for name, size in sent.items())
    found = spans(call, parts)
    assert found["flags"][0] == 0  # where they are for calls of all shapes
    assert all(begin % 256 == 0 for begin, _ in found.values())
    for (_, end), (begin, _) in itertools.pairwise(sorted(found.values())):
        assert end <= begin, found
    assert max(end for _, end in found.values()) <= exchange.memory.block.numel()


@PUSHED
@pytest.mark.parametrize(
    "num_tokens",
    [(5, 5), (3, 8, 0), (2, 0, 7, 1, 1, 6, 3, 4)],
    ids=["two alike", "three, one without tokens", "eight, all different"],
)
def test_what_ranks_exchange_arrives(num_tokens: tuple[int, ...], is_pushed: bool) -> None:
    """Every rank finds all others' tables and tokens where it reads them."""
    blocks = [torch.zeros(2**15, dtype=torch.uint8) for _ in num_tokens]
    tables = [
        {name: torch.full((n, 2), 10 * rank + i).byte() for i, name in enumerate(TABLES)}
        for rank, n in enumerate(num_tokens)
    ]
    tokens = [torch.full((n, 16), 100 + rank).byte() for rank, n in enumerate(num_tokens)]
    call = CallShape(num_tokens, 2, num_experts=len(blocks), token_bytes=16, is_pushed=is_pushed)
    ranks = range(len(blocks))
    found = [exchange_over(HostMemory(blocks, rank)).places(call) for rank in ranks]
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
            for name, address in zip(ARRIVING, sources, strict=False):
                if other == rank:
                    assert address == 0, f"{name} of rank {rank} itself"
                    continue
                sent = tokens[other] if name == "tokens" else tables[other][name]
                expected = bytes(sent.flatten().tolist())
                got = ctypes.string_at(address, len(expected))
                assert got == expected, f"{name} of rank {other} at {rank}"


def test_what_arrives_meets_nothing_that_is_read() -> None:
    """It can arrive while its receiver still reads the sums of the call before."""
    exchange = exchange_over(CountedMemory())
    calls = [
        CallShape((count, count // 2, 1, 0), k, 16, token_bytes, is_pushed)
        for count, token_bytes in ((64, 4096), (3000, 128), (700, 1024), (1, 16), (2000, 4096))
        for k, is_pushed in ((8, False), (1, True), (8, True))
    ]
    for before, call in itertools.pairwise([*calls, *calls[::-1]]):
        old = spans(before, exchange.parts(before))
        block = exchange.memory.block
        new = spans(call, exchange.parts(call))
        first = min(new[name][0] for name in ARRIVING)
        assert max(new[name][1] for name in LASTING) <= first
        assert max(new[name][1] for name in ARRIVING) <= exchange.memory.block.numel()
        has_moved = exchange.memory.block is not block
        assert has_moved or max(old[name][1] for name in LASTING) <= first


def test_backward_notices_that_the_memory_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another layer may let the memory grow between a layer's forward and its backward."""
    exchange = exchange_over(CountedMemory())
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
    exchange = exchange_over(CountedMemory())
    call = CallShape((64, 64), 2, 8, token_bytes=4096, is_pushed=True)
    before = exchange.parts(call)
    with pytest.raises(RuntimeError, match="no symmetric memory"):
        exchange.parts(replace(call, num_tokens=(10**6, 64)))
    assert exchange.parts(call) == before
