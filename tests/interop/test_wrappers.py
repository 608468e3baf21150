# SPDX-License-Identifier: Apache-2.0
"""The layer inside torch's own data parallel wrappers, without DeepSpeed's engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.parity import HIDDEN, build, named_grads, tokens
from helpers.tolerance import assert_close
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from comet_ds import MoE


class Model(nn.Module):
    def __init__(self, rank: int, stacks: bool, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(HIDDEN, HIDDEN)
        options |= dict(k=2, drop_tokens=False, parallel=True, comet_ds={"stack_experts": stacks})
        self.moe = build(MoE, rank, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(self.first(x))[0]

    @property
    def experts(self) -> nn.Module:
        return self.moe.deepspeed_moe.experts


def replicate(model: Model, ignores: bool, **options: Any) -> nn.Module:
    names = [name for name, _ in model.named_parameters() if "experts" in name]
    if ignores:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    return DistributedDataParallel(model, **options)


def flatten(model: Model, ignores: bool, **options: Any) -> nn.Module:
    ignored = list(model.experts.parameters()) if ignores else None
    cpu = torch.device("cpu")
    return FullyShardedDataParallel(model, device_id=cpu, ignored_states=ignored, **options)


def shard(model: Model, ignores: bool) -> nn.Module:
    ignored = set(model.experts.parameters()) if ignores else set()
    return fully_shard(model, ignored_params=ignored)


def flatten_views(model: Model, ignores: bool) -> nn.Module:
    return flatten(model, ignores, use_orig_params=True)


WRAPPERS = {
    "DistributedDataParallel": replicate,
    "FSDP": flatten,
    "FSDP, original parameters": flatten_views,
    "fully_shard": shard,
}


def check_refused(rank: int, size: int, name: str, stacks: bool) -> str:
    model = Model(rank, stacks, ep_size=size)
    wrapped = WRAPPERS[name](model, False)
    x, _ = tokens(rank, (12, HIDDEN))
    try:
        wrapped(x)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("stacks", [True, False])
@pytest.mark.parametrize("name", WRAPPERS)
def test_experts_of_several_ranks_are_refused(world, name: str, stacks: bool) -> None:
    for answer in world(2).run(check_refused, name, stacks):
        wrapper = "DistributedDataParallel" if name == "DistributedDataParallel" else "FSDP"
        assert answer.startswith(
            f"experts differ between the ranks of an expert parallel group, but {wrapper} "
        )
        assert "comet_ds.initialize" in answer


def grads_of_experts(model: nn.Module, layer: Any, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(7)
    model(x).backward(grad)
    return {n: g.clone() for n, g in named_grads(layer).items() if "deepspeed_experts" in n}


def check_left_out(rank: int, size: int, name: str, stacks: bool) -> None:
    """Experts that the wrapper leaves out have the gradients they have without it."""
    plain, model = (Model(rank, stacks, ep_size=size) for _ in range(2))
    wrapped = WRAPPERS[name](model, True)
    x, grad = tokens(rank, (12, HIDDEN))
    for _ in range(2):  # the second forward does not look again
        for m in (plain, model):
            m.zero_grad()
        expected = grads_of_experts(plain, plain.moe, x, grad)
        got = grads_of_experts(wrapped, model.moe, x, grad)
        for key, value in expected.items():
            assert_close(got[key], value, f"rank {rank}: {key}")
    assert expected


@pytest.mark.parametrize("stacks", [True, False])
@pytest.mark.parametrize("name", WRAPPERS)
def test_experts_left_out_are_right(world, name: str, stacks: bool) -> None:
    world(2).run(check_left_out, name, stacks)


def check_replicas(rank: int, size: int, ep_size: int, stacks: bool) -> None:
    """Copies of the same experts may be averaged: by all at ep_size 1, else by their replicas."""
    group = None
    for first in range(ep_size):
        ranks = list(range(first, size, ep_size))
        made = torch.distributed.new_group(ranks)
        group = made if rank in ranks else group
    plain, model = (Model(rank, stacks, ep_size=ep_size) for _ in range(2))
    wrapped = replicate(model, False, process_group=group)
    x, grad = tokens(rank, (12, HIDDEN))
    expected = grads_of_experts(plain, plain.moe, x, grad)
    got = grads_of_experts(wrapped, model.moe, x, grad)
    for key, value in expected.items():
        torch.distributed.all_reduce(value, group=group)
        assert_close(got[key], value * ep_size / size, f"rank {rank}: {key}")


@pytest.mark.parametrize("stacks", [True, False])
@pytest.mark.parametrize(("size", "ep_size"), [(2, 1), (4, 2)])
def test_replicas_of_experts_are_averaged(world, size: int, ep_size: int, stacks: bool) -> None:
    world(size).run(check_replicas, ep_size, stacks)


def check_sharded_stacks(rank: int, size: int, name: str) -> str:
    model = Model(rank, True, ep_size=1)
    try:
        WRAPPERS[name](model, False)(tokens(rank, (12, HIDDEN))[0])
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("name", [name for name in WRAPPERS if "Distributed" not in name])
def test_sharded_stacks_are_refused(world, name: str) -> None:
    for answer in world(2).run(check_sharded_stacks, name):
        assert '"stack_experts": False' in answer
