# SPDX-License-Identifier: Apache-2.0
"""A rank that does not come: the others name it in time."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest
import torch
from helpers.distributed import World
from helpers.parity import HIDDEN, build, tokens
from torch import Tensor

from comet_ds import MoE

VARIANTS = {
    "reference": {"path": "reference"},
    "1 chunk": {"path": "pipelined", "num_chunks": 1},
    "2 chunks": {"num_chunks": 2},
}
TIMEOUT_S = 4
LATE = 2  # the rank that does not come


def first_forward(layer: MoE, x: Tensor, grad: Tensor, comes: bool) -> None:
    if comes:
        layer.eval()(x)


def later_forward(layer: MoE, x: Tensor, grad: Tensor, comes: bool) -> None:
    for _ in range(2):
        layer(x)[0].backward(grad)
    if comes:
        layer.eval()(x)


def backward(layer: MoE, x: Tensor, grad: Tensor, comes: bool) -> None:
    output = layer(x)[0]
    if comes:
        output.backward(grad)


MISSED = {
    "first forward": (first_forward, "its forward number 1"),
    "later forward": (later_forward, "its forward number 3"),
    "backward": (backward, "the backward of its forward number 1"),
}


def check_late(rank: int, size: int, case: Callable, block: dict) -> tuple[str, float]:
    block = {**block, "timeout_s": TIMEOUT_S}
    layer = build(MoE, rank, ep_size=size, k=2, parallel=True, comet_ds=block)
    x, grad = tokens(rank, (12, HIDDEN))
    torch.distributed.barrier()
    start, answer = time.monotonic(), ""
    try:
        case(layer, x, grad, rank != LATE)
    except RuntimeError as error:
        answer = str(error)
    waited_s = time.monotonic() - start
    if rank == LATE:
        time.sleep(2 * TIMEOUT_S)
    return answer, waited_s


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MISSED)
def test_late_rank_is_named(world, name: str, variant: str) -> None:
    case, missed = MISSED[name]
    running = world(4)
    try:
        answers = running.run(check_late, case, VARIANTS[variant], timeout=60)
    finally:
        running.close()  # its process group has a collective under way
    expected = f"rank {LATE} of the expert parallel group did not reach {missed} within 4 s"
    for rank, (answer, waited_s) in enumerate(answers):
        assert answer == ("" if rank == LATE else expected), f"rank {rank}: {answer}"
        assert waited_s < 4 * TIMEOUT_S


def check_killed(rank: int, size: int, block: dict) -> None:
    block = {**block, "timeout_s": TIMEOUT_S}
    layer = build(MoE, rank, ep_size=size, k=2, parallel=True, comet_ds=block)
    x, _ = tokens(rank, (12, HIDDEN))
    layer(x)
    if rank == LATE:
        os.kill(os.getpid(), signal.SIGKILL)
    layer(x)


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_rank_is_named(variant: str) -> None:
    with pytest.raises(AssertionError) as failure:
        World(4).run(check_killed, VARIANTS[variant], timeout=60)
    # Two hear of it from a broken connection, the one opposite waits for the time it has.
    named = f"RuntimeError: rank {LATE} of the expert parallel group did not reach its forward"
    assert str(failure.value).count(named) == 3


def check_slow(rank: int, size: int, block: dict) -> None:
    """A rank that is late but comes in time is waited for, whatever was written down."""
    layer = build(MoE, rank, ep_size=size, k=2, parallel=True, comet_ds={**block, "timeout_s": 20})
    x, grad = tokens(rank, (12, HIDDEN))
    expected = None
    for late in (None, 0, 1, None):
        if rank == late:
            time.sleep(2.5)
        layer.zero_grad()
        torch.manual_seed(3)
        output = layer(x)[0]
        output.backward(grad)
        found = [output.detach(), *(p.grad for p in layer.parameters())]
        expected = expected or [t.clone() for t in found]
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("variant", VARIANTS)
def test_slow_rank_is_waited_for(world, variant: str) -> None:
    world(2).run(check_slow, VARIANTS[variant], timeout=60)
