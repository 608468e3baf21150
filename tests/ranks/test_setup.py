# SPDX-License-Identifier: Apache-2.0
"""What one rank does wrong, every rank says; none is left waiting."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
from deepspeed.moe.utils import is_moe_param
from helpers.distributed import error_of
from helpers.experts_zoo import HandWrittenMLP, sequential
from helpers.parity import FFN, HIDDEN, VARIANTS, build
from torch import nn

from comet_ds import MoE
from comet_ds.ranks.setup import agree_on_setup


def check_fault(rank: int, size: int, variant: str) -> list[str]:
    """Only the last rank's input is bad; every rank must say so, and the next call must work."""
    layer = build(MoE, rank, ep_size=size, parallel=True, comet_ds=VARIANTS[variant])
    messages = []
    for bad in (
        torch.randn(8, HIDDEN + 1),
        torch.randn(8, HIDDEN).half(),
        torch.empty(8, HIDDEN, device="meta"),
    ):
        x = bad if rank == size - 1 else torch.randn(8, HIDDEN)
        messages.append(error_of(layer, x))
    used = torch.ones(7 if rank == size - 1 else 8)
    messages.append(error_of(layer, torch.randn(8, HIDDEN), used))
    assert layer(torch.randn(8, HIDDEN))[0].isfinite().all()
    return messages


@pytest.mark.parametrize("variant", ["reference", "2 chunks"])
def test_bad_input_on_one_rank_is_an_error_on_all(world, variant: str) -> None:
    rules = ["hidden size 16, got 17", "dtype torch.float32, got torch.float16", "device cpu"]
    rules += ["used_token must have one entry per token, on the layer's device cpu, got 7 entries"]
    for messages in world(2).run(check_fault, variant):
        for message, rule in zip(messages, rules, strict=True):
            assert rule in message, message
    # The ranks whose input was good say whose was not.
    assert "rank 1 of the expert parallel group" in world(2).run(check_fault, variant)[0][0]


def check_disagreement(rank: int, size: int, options: list[dict]) -> str:
    return error_of(lambda: build(MoE, rank, parallel=True, **options[rank]))


# The options of either rank, and what both say.
DISAGREEMENTS: dict[str, tuple[list[dict], str]] = {
    "k": (
        [dict(k=1), dict(k=2)],
        "k must be the same on all ranks, got 1 on rank 0 and 2 on rank 1",
    ),
    "ep_size": ([dict(ep_size=1), dict(ep_size=2)], "ep_size must be the same"),
    "number of experts": ([dict(), dict(num_experts=16)], "num_experts must be the same"),
    "dropping": ([dict(), dict(drop_tokens=False)], "drop_tokens must be the same"),
    "size of an expert": (
        [dict(), dict(expert=sequential(HIDDEN, FFN + 8))],
        "expert parameters must be the same",
    ),
    "dtype": ([dict(), dict(dtype=torch.bfloat16)], "expert parameters must be the same"),
    "class of an expert": (
        [dict(), dict(expert=HandWrittenMLP(HIDDEN, FFN))],
        "expert class must be the same",
    ),
    "path": ([dict(), dict(comet_ds={"path": "reference"})], "path must be the same"),
    "chunks": ([dict(), dict(comet_ds={"num_chunks": 3})], "num_chunks must be the same"),
    "ep_size larger than the world": (
        [dict(ep_size=4)] * 2,
        "ep_size must divide the number of ranks that hold the layer (2)",
    ),
}


@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_bad_setup_is_an_error_on_all(world, name: str) -> None:
    options, message = DISAGREEMENTS[name]
    for answer in world(2).run(check_disagreement, options, timeout=60):
        assert message in answer


def check_missing_rank(rank: int, size: int) -> str:
    if rank == 1:
        return "rank 1"
    return error_of(lambda: agree_on_setup({}, range(2), timeout=timedelta(seconds=1)))


def test_rank_without_the_layer(world) -> None:
    answer = world(2).run(check_missing_rank, timeout=60)[0]
    assert "rank 1 did not take part" in answer
    world(2).close()  # the two ranks' call counts differ from here on


def check_setup(rank: int, size: int) -> None:
    """Initialising twice keeps the group; parameters put in later get their tags."""
    layer = build(MoE, rank, ep_size=size, parallel=True)
    layer.deepspeed_moe.experts.deepspeed_experts[0].adapter = nn.Linear(2, 2)
    layer.set_deepspeed_parallelism()
    tagged = [n for n, p in layer.named_parameters() if is_moe_param(p)]
    assert any("adapter" in n for n in tagged)
    assert {p.group_name for p in layer.parameters() if is_moe_param(p)} == {"ep_size_2"}


def test_setup_can_be_repeated(world) -> None:
    world(2).run(check_setup)
