# SPDX-License-Identifier: Apache-2.0
"""Gradients that only some ranks need, gradients of gradients, and of recomputed routes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from helpers.parity import FFN, HIDDEN, VARIANTS, build, named_grads, tokens
from helpers.tolerance import assert_close, relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from comet_ds import MoE
from comet_ds.ranks.gradients import first_order_only

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


def check_needs(rank: int, size: int, name: str, block: dict, **where: Any) -> int:
    """What is needed has the gradient that it has where all ranks need all."""
    need = NEEDS[name][rank]
    block = {**block, "stack_experts": False}
    options = dict(ep_size=size, k=4, drop_tokens=False, parallel=True, comet_ds=block)
    layer = build(MoE, rank, **options, **where)
    shape = need.get("tokens", 24 + rank), HIDDEN
    x, grad = (t.to(layer.deepspeed_moe.gate.wg.weight) for t in tokens(rank, shape))
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


def check_needs_on_gpu(rank: int, size: int, name: str, path: str) -> None:
    where = dict(device=f"cuda:{rank}", dtype=torch.bfloat16)
    assert check_needs(rank, size, name, {"path": path}, **where) >= 0


@pytest.mark.gpu(2)
@pytest.mark.parametrize("path", ["fused", "pipelined"])
@pytest.mark.parametrize("name", NEEDS)
def test_gradients_that_some_ranks_need_on_gpu(world, name: str, path: str) -> None:
    world(2, "nccl").run(check_needs_on_gpu, name, path, timeout=HANG_S)


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


def check_absent(rank: int, size: int, block: dict, **where: Any) -> str:
    layer = build(MoE, rank, ep_size=size, k=2, parallel=True, comet_ds=block, **where)
    x, grad = (t.to(layer.deepspeed_moe.gate.wg.weight) for t in tokens(rank, (8, HIDDEN)))
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


def check_absent_on_gpu(rank: int, size: int) -> str:
    where = dict(device=f"cuda:{rank}", dtype=torch.bfloat16)
    return check_absent(rank, size, {"path": "fused"}, **where)


@pytest.mark.gpu(2)
def test_a_fused_backward_without_all_ranks_is_refused(world) -> None:
    answers = world(2, "nccl").run(check_absent_on_gpu, timeout=HANG_S)
    assert answers[0].startswith("rank 1 of the expert parallel group ran this forward without")


# ---- gradients of gradients --------------------------------------------------------------------


def smooth() -> nn.Module:
    return nn.Sequential(nn.Linear(HIDDEN, FFN), nn.Tanh(), nn.Linear(FFN, HIDDEN))


def second_order(cls: type, rank: int, what: str, **options: Any) -> dict[str, Tensor | None]:
    """Return the gradients of a penalty on gradients."""
    layer = build(cls, rank, expert=smooth(), parallel=True, **options)
    x, grad = tokens(rank, (24, HIDDEN))
    x.requires_grad_()
    torch.manual_seed(7)
    output, l_aux, _ = layer(x)
    loss = output.sum() if what == "sum" else (output * grad).sum() + l_aux
    asked = [x] if what != "parameters" else [p for p in layer.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, asked, create_graph=True)
    sum(g.square().sum() for g in grads).backward()
    return named_grads(layer) | {"grad of x": x.grad}


SECOND_ORDER = {
    "sum, k=1": ("sum", dict(k=1)),
    "sum, k=2": ("sum", dict(k=2)),
    "sum, k=4, not dropping": ("sum", dict(k=4, drop_tokens=False)),
    "dropping": ("weighted", dict(k=2, capacity_factor=0.5)),
    "parameters": ("parameters", dict(k=2)),
}


def check_second_order(rank: int, size: int, name: str) -> float:
    what, options = SECOND_ORDER[name]
    expected = second_order(DeepSpeedMoE, rank, what, ep_size=size, **options)
    for variant, block in VARIANTS.items():
        got = second_order(MoE, rank, what, ep_size=size, **options, comet_ds=block)
        for key, value in expected.items():
            if value is None or got[key] is None:  # a bias that nothing depends on
                present = value if value is not None else got[key]
                assert present is None or not present.any(), f"{variant}: {key}"
            else:
                assert_close(got[key], value, f"rank {rank}, {variant}: {key}")
    return torch.linalg.vector_norm(expected["grad of x"]).item()


@pytest.mark.parametrize("name", SECOND_ORDER)
@pytest.mark.parametrize("size", [1, 2])
def test_second_order(world, size: int, name: str) -> None:
    assert min(world(size).run(check_second_order, name, timeout=HANG_S)) > 1e-3


class Square(torch.autograd.Function):
    """x^2 whose gradient comes from somewhere that autograd does not see."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad * ctx.saved_tensors[0]


def test_kernels_refuse_second_order() -> None:
    """Also where the incoming gradient requires none: ``once_differentiable`` returns 0 there."""
    x = torch.randn(3, requires_grad=True)
    (grad,) = torch.autograd.grad(Square.apply(x).sum(), x, create_graph=True)
    assert torch.equal(grad, 2 * x)
    with pytest.raises(RuntimeError, match="Square of comet_ds cannot be differentiated once more"):
        grad.square().sum().backward()
    Square.apply(x).sum().backward()
    assert torch.equal(x.grad, 2 * x)


@pytest.mark.gpu(1)
@pytest.mark.parametrize("path", ["fused", "pipelined", "reference"])
def test_kernels_of_the_layer_refuse_second_order(path: str) -> None:
    """On every path the gate's kernels do, whatever requires a gradient."""
    block = {"path": path}
    layer = build(MoE, 0, k=2, device="cuda", dtype=torch.bfloat16, comet_ds=block)
    x = torch.randn(24, HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated once more"):
        grad.float().square().sum().backward()


def test_third_order_is_refused() -> None:
    layer = build(MoE, 0, expert=smooth(), k=2)
    x = torch.randn(5, HIDDEN, requires_grad=True)
    (first,) = torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated once more"):
        second.square().sum().backward()


# ---- recomputed routes -------------------------------------------------------------------------


def recompute(layer: MoE, x: Tensor, grad: Tensor, seeds: tuple[int, int]) -> dict[str, Tensor]:
    """Run under activation checkpointing that draws anew, from another seed than the forward."""
    x = x.clone().requires_grad_()
    torch.manual_seed(seeds[0])
    output, l_aux, _ = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)
    layer.zero_grad()
    torch.manual_seed(seeds[1])
    torch.autograd.backward([output, l_aux], [grad, torch.ones_like(l_aux)])
    return named_grads(layer) | {"grad of x": x.grad}


# What differs in the second routing: which tokens are kept, or also how many each expert has.
REDRAWN = {
    "kept tokens": dict(k=1, capacity_factor=0.5, min_capacity=1),
    "experts": dict(k=1, noisy_gate_policy="RSample", drop_tokens=False),
    "second experts": dict(k=2, drop_tokens=False),
}


def check_recomputed(rank: int, size: int, name: str, block: dict) -> str:
    """Gradients are those of the routing that was recomputed, or there are none."""
    layer = build(MoE, rank, ep_size=size, parallel=True, comet_ds=block, **REDRAWN[name])
    x, grad = tokens(rank, (48, HIDDEN))
    same = recompute(layer, x, grad, (7, 7))
    expected = recompute(layer, x, grad, (11, 11))
    key = "grad of deepspeed_moe.gate.wg.weight"
    assert relative_error(same[key], expected[key]) > 0.1  # the seed decides
    try:
        found = recompute(layer, x, grad, (7, 11))
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    for what, value in expected.items():
        assert_close(found[what], value, f"rank {rank}: {what}")
    return ""


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [1, 2])
def test_recomputed_tokens(world, size: int, variant: str) -> None:
    answers = world(size).run(check_recomputed, "kept tokens", VARIANTS[variant], timeout=HANG_S)
    assert not any(answers)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["experts", "second experts"])
def test_recomputed_experts_are_refused(world, name: str, variant: str) -> None:
    (answer,) = world(1).run(check_recomputed, name, VARIANTS[variant], timeout=HANG_S)
    assert answer.startswith("CheckpointError")
