# SPDX-License-Identifier: Apache-2.0
"""Gradients that only some ranks need, gradients of gradients, and of recomputed routes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity import HIDDEN, VARIANTS, build, named_grads, tokens
from tolerance import assert_close
from torch import Tensor, nn

from comet_ds import MoE

HANG_S = 60  # a backward that has not returned by then waits for good

# ---- gradients that only some ranks need -------------------------------------------------------

# By rank: local experts that are frozen, whether the input and the gate's weight need a gradient,
# and how many tokens there are.
EXPERTS = range(4)
NEEDS: dict[str, list[dict[str, Any]]] = {
    "other experts frozen on each rank": [dict(frozen=[0, 1]), dict(frozen=[2, 3])],
    "experts frozen on one rank only": [dict(frozen=EXPERTS), {}],
    "input on one rank only": [dict(x=True), {}],
    "input on one rank only, experts frozen": [
        dict(x=True, frozen=EXPERTS),
        dict(frozen=EXPERTS),
    ],
    "input on one rank only, all else frozen": [
        dict(x=True, frozen=EXPERTS, gate=False),
        dict(frozen=EXPERTS, gate=False),
    ],
    "no tokens on one rank": [dict(x=True), dict(tokens=0)],
    "no tokens on one rank, experts frozen": [
        dict(x=True, frozen=EXPERTS),
        dict(tokens=0, frozen=EXPERTS),
    ],
    "gate on one rank only": [{}, dict(gate=False)],
    "gate alone, on one rank only": [dict(frozen=EXPERTS), dict(frozen=EXPERTS, gate=False)],
}


def gradients(layer: MoE, x: Tensor, grad: Tensor) -> dict[str, Tensor | None]:
    torch.manual_seed(7)
    output = layer(x)[0]
    layer.zero_grad()
    if output.requires_grad:  # not where nothing is needed here, nor exchanged in backward
        output.backward(grad)
    return {name: g for name, g in named_grads(layer).items() if g is not None} | (
        {} if x.grad is None else {"grad of x": x.grad}
    )


def check_needs(rank: int, size: int, name: str, block: dict) -> int:
    """What is needed has the gradient that it has where all ranks need all."""
    need = NEEDS[name][rank]
    block = {**block, "stack_experts": False}
    options = dict(ep_size=size, k=4, drop_tokens=False, parallel=True, comet_ds=block)
    layer = build(MoE, rank, **options)
    x, grad = tokens(rank, (need.get("tokens", 24 + rank), HIDDEN))
    everything = gradients(layer, x.clone().requires_grad_(), grad)
    for index in need.get("frozen", ()):
        layer.deepspeed_moe.experts.deepspeed_experts[index].requires_grad_(False)
    layer.deepspeed_moe.gate.requires_grad_(need.get("gate", True))
    found = gradients(layer, x.clone().requires_grad_(need.get("x", False)), grad)
    wanted = {n for n, p in layer.named_parameters() if p.requires_grad}
    wanted = {f"grad of {n}" for n in wanted} | ({"grad of x"} if need.get("x") else set())
    assert set(found) == wanted
    for key, value in found.items():
        assert_close(value, everything[key], f"rank {rank}: {key}")
    return len(found)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", NEEDS)
def test_gradients_that_some_ranks_need(world, name: str, variant: str) -> None:
    assert sum(world(2).run(check_needs, name, VARIANTS[variant], timeout=HANG_S)) > 0


def check_asked(rank: int, size: int, block: dict) -> None:
    """``torch.autograd.grad`` for experts of one chunk here and of another there."""
    options = dict(ep_size=size, k=4, drop_tokens=False, parallel=True, comet_ds=block)
    layer = build(MoE, rank, **options)
    x, grad = tokens(rank, (24, HIDDEN))
    torch.manual_seed(7)
    everything = gradients(layer, x, grad)
    experts = layer.deepspeed_moe.experts.deepspeed_experts
    asked = dict(experts[3 * rank].named_parameters())
    torch.manual_seed(7)
    found = torch.autograd.grad(layer(x)[0], list(asked.values()), grad)
    for name, value in zip(asked, found, strict=True):
        key = f"grad of deepspeed_moe.experts.deepspeed_experts.{3 * rank}.{name}"
        assert_close(value, everything[key], f"rank {rank}: {key}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_asked_for_differ_between_ranks(world, variant: str) -> None:
    world(2).run(check_asked, VARIANTS[variant] | {"stack_experts": False}, timeout=HANG_S)


class Careless(nn.Linear):
    """An expert that cuts the graph where it has been told so."""

    cuts = False

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach() if self.cuts else x)


def check_careless(rank: int, size: int, block: dict) -> None:
    """What experts do to the graph is their affair: those of rank 0 cut it, in one chunk."""
    expert = Careless(HIDDEN, HIDDEN)
    layer = build(MoE, rank, expert=expert, ep_size=size, k=1, parallel=True, comet_ds=block)
    layer.deepspeed_moe.gate.requires_grad_(False)
    experts = layer.deepspeed_moe.experts.deepspeed_experts
    x, grad = tokens(rank, (40, HIDDEN))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    everything = gradients(layer, inputs[0], grad)
    for index in (0, 1):
        experts[index].cuts = rank == 0
    found = gradients(layer, inputs[1], grad)
    for name in everything:
        if name != "grad of x":
            assert_close(found[name], everything[name], f"rank {rank}: {name}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_experts_that_cut_the_graph(world, variant: str) -> None:
    world(2).run(check_careless, VARIANTS[variant], timeout=HANG_S)


def check_absent(rank: int, size: int, block: dict) -> str:
    layer = build(MoE, rank, ep_size=size, k=2, parallel=True, comet_ds=block)
    x, grad = tokens(rank, (8, HIDDEN))
    with torch.set_grad_enabled(rank == 0):
        output = layer(x)[0]
    try:
        if rank == 0:
            output.backward(grad)
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_backward_without_all_ranks_is_refused(world, variant: str) -> None:
    answers = world(2).run(check_absent, VARIANTS[variant], timeout=HANG_S)
    assert answers[0].startswith(
        "rank 1 of the expert parallel group ran this forward without gradients"
    )
    assert answers[1] == ""
