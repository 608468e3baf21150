# SPDX-License-Identifier: Apache-2.0
"""Stacked experts as their modules show them: names, values, freezing, gradients."""

from __future__ import annotations

import functools

import pytest
import torch
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from helpers.experts_zoo import GatedMLP, sequential
from helpers.layouts import (
    assert_same,
    assert_trains_alike,
    both,
    experts,
    grads,
    layers,
    one,
    run,
    stacks,
    values,
)
from helpers.training import FFN, HIDDEN, NUM_EXPERTS, Model
from torch import nn

import comet_ds

# ---- names, shapes, counts -----------------------------------------------------------------------


def test_names_of_the_stacks() -> None:
    """What rules by name and by number of dimensions see."""
    layer, _ = layers(nn.ModuleDict({"mlp": GatedMLP(HIDDEN, FFN, bias=True)}))
    found = {n: tuple(p.shape) for n, p in layer.named_parameters() if "expert" in n}
    prefix = "deepspeed_moe.experts.deepspeed_experts_mlp__"
    assert found == {
        f"{prefix}w1_stacked.weight": (NUM_EXPERTS, FFN, HIDDEN),
        f"{prefix}w1_stacked.bias": (NUM_EXPERTS * FFN,),
        f"{prefix}w3_stacked.weight": (NUM_EXPERTS, FFN, HIDDEN),
        f"{prefix}w3_stacked.bias": (NUM_EXPERTS * FFN,),
        f"{prefix}w2_stacked.weight": (NUM_EXPERTS, HIDDEN, FFN),
        f"{prefix}w2_stacked.bias": (NUM_EXPERTS * HIDDEN,),
    }
    for name in found:
        assert layer.get_parameter(name).group_name == "ep_size_1"
        assert layer.get_parameter(name).allreduce is False


@pytest.mark.parametrize("num_experts", [1, 4])
def test_state_dict_is_deepspeeds(num_experts: int) -> None:
    made = []
    for cls in (DeepSpeedMoE, comet_ds.MoE):
        torch.manual_seed(0)
        made.append(cls(HIDDEN, sequential(HIDDEN, FFN), num_experts, use_residual=True))
    assert made[1].deepspeed_moe.experts.is_stacked
    for part in (
        lambda layer: layer,
        lambda layer: layer.deepspeed_moe.experts,
        experts,
        lambda layer: experts(layer)[-1],
        lambda layer: experts(layer)[-1][0],
    ):
        assert_same(*(part(layer).state_dict() for layer in made))
        assert_same(*(part(layer).state_dict(prefix="a.") for layer in made))
        named = [dict(part(layer).state_dict(keep_vars=True)) for layer in made]
        assert [type(p) for p in named[0].values()] == [nn.Parameter] * len(named[0])
        assert all(isinstance(p, nn.Parameter) for p in named[1].values())


def test_counts() -> None:
    for part in (
        lambda model: model,
        lambda model: model.moe[0],
        lambda model: model.moe[0].deepspeed_moe.experts,
        lambda model: experts(model.moe[0]),
        lambda model: experts(model.moe[0])[2],
        lambda model: experts(model.moe[0])[2][0],
    ):
        stacked, unstacked = (part(model) for model in both())
        counts = [sum(p.numel() for p in module.parameters()) for module in (stacked, unstacked)]
        assert counts[0] == counts[1] > 0
    for options in ({}, {"recurse": False}, {"prefix": "a"}, {"remove_duplicate": False}):
        for part in (lambda expert: expert, lambda expert: expert[0]):
            named = [part(experts(m.moe[0])[2]).named_parameters(**options) for m in both()]
            assert_same(*({name: p.detach().clone() for name, p in n} for n in named))
    model = one()
    assert len([n for n, _ in model.named_parameters() if "expert" in n]) == 2 * 4
    assert [p.shape for p in experts(model.moe[0])[0].parameters()] == [
        (FFN, HIDDEN), (FFN,), (HIDDEN, FFN), (HIDDEN,)
    ]  # fmt: skip


def test_repr_and_attributes() -> None:
    expert, other = (experts(model.moe[0])[1] for model in both())
    assert repr(expert) == repr(other)
    assert type(expert[0]) is nn.Linear and isinstance(expert[0].weight, nn.Parameter)
    assert hasattr(expert[0], "weight") and not hasattr(expert[0], "weights")
    assert repr(expert[0].weight) == repr(other[0].weight)
    assert expert[0].bias is not None and getattr(expert[1], "weight", None) is None


def test_attributes_are_the_stacks() -> None:
    layer = one().moe[0]
    expert = experts(layer)[1]
    assert expert[0].weight.allreduce is False and not hasattr(expert[0].weight, "note")
    expert[0].weight.note = 3
    assert stacks(layer)["0.weight"].note == 3 and not hasattr(expert[0].bias, "note")


# ---- initialising --------------------------------------------------------------------------------


def by_class(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def with_module(function, model: Model) -> None:
    for layer in model.moe:
        for expert in experts(layer):
            function(expert[0])


def assign_grads_and_step(linear: nn.Linear) -> None:
    """A hand-written optimizer."""
    linear.weight.grad = torch.ones_like(linear.weight)
    with torch.no_grad():
        linear.weight -= 0.1 * linear.weight.grad
    linear.weight.grad = None


INITS = {
    "apply": lambda model: model.apply(by_class),
    "reset_parameters": functools.partial(with_module, nn.Linear.reset_parameters),
    "xavier": functools.partial(with_module, lambda m: nn.init.xavier_uniform_(m.weight)),
    "orthogonal": functools.partial(with_module, lambda m: nn.init.orthogonal_(m.weight)),
    "data.copy_": functools.partial(
        with_module, lambda m: m.weight.data.copy_(torch.randn(FFN, HIDDEN))
    ),
    "data =": functools.partial(with_module, lambda m: setattr(m.bias, "data", torch.randn(FFN))),
    "data[...] =": functools.partial(with_module, lambda m: m.weight.data[0].fill_(7)),
    "data *=": functools.partial(with_module, lambda m: setattr(m.bias, "data", m.bias.data * 3)),
    "detach": functools.partial(with_module, lambda m: m.weight.detach().mul_(2)),
    "grad and step": functools.partial(with_module, assign_grads_and_step),
    "vector_to_parameters": lambda model: nn.utils.vector_to_parameters(
        torch.randn(FFN * HIDDEN * 2 + FFN + HIDDEN), experts(model.moe[1])[2].parameters()
    ),
}


@pytest.mark.parametrize("name", INITS)
def test_initialising_in_place(name: str) -> None:
    models = both()
    before = values(models[0])
    for model in models:
        torch.manual_seed(4)
        INITS[name](model)
    assert_same(*(values(model) for model in models))
    changed = [n for n, value in values(models[0]).items() if not torch.equal(value, before[n])]
    assert any("deepspeed_experts.2" in n for n in changed)
    row = experts(models[0].moe[1])[2][0].weight
    assert torch.equal(row, stacks(models[0].moe[1])["0.weight"][2])


def test_initialising_by_attribute() -> None:
    """A function that takes a stack for a convolution's weight has its way with the rows later."""
    layer = one().moe[0]
    layer.apply(lambda m: nn.init.xavier_uniform_(m.weight) if hasattr(m, "weight") else None)
    bound = (6 / (HIDDEN + FFN)) ** 0.5
    for expert in experts(layer):
        assert 0.9 * bound < expert[0].weight.abs().max() <= bound


def test_in_place_with_gradients_is_an_error() -> None:
    for model in both():
        with pytest.raises(RuntimeError, match=r"leaf Variable that requires grad.*in-place"):
            experts(model.moe[0])[0][0].weight.normal_()


# ---- freezing ------------------------------------------------------------------------------------


def freeze_by_name(pattern: str, model: Model) -> None:
    for name, param in model.named_parameters():
        if pattern in name:
            param.requires_grad = False


def freeze_each(model: Model) -> None:
    for expert in experts(model.moe[0]):
        for param in expert.parameters():
            param.requires_grad = False


def freeze_then_train_one_matrix(model: Model) -> None:
    model.requires_grad_(False)
    for expert in experts(model.moe[0]):
        expert[0].weight.requires_grad_(True)


FREEZES = {
    "name": functools.partial(freeze_by_name, "deepspeed_experts"),
    "name of a bias": functools.partial(freeze_by_name, "bias"),
    "each parameter": freeze_each,
    "each module": lambda model: [e.requires_grad_(False) for e in experts(model.moe[0])],
    "module list": lambda model: experts(model.moe[0]).requires_grad_(False),
    "experts": lambda model: model.moe[0].deepspeed_moe.experts.requires_grad_(False),
    "then train one matrix": freeze_then_train_one_matrix,
}


@pytest.mark.parametrize("name", FREEZES)
def test_freezing(name: str) -> None:
    models = both()
    for model in models:
        FREEZES[name](model)
    flags = [
        {n: p.requires_grad for n, p in model.state_dict(keep_vars=True).items()}
        for model in models
    ]
    assert_same(*flags)
    assert set(flags[0].values()) == {True, False}
    assert_trains_alike(*models)


def test_unfreezing_expert_by_expert() -> None:
    layer = one().moe[0]
    stack = stacks(layer)["0.weight"]
    experts(layer).requires_grad_(False)
    assert not stack.requires_grad
    for index, expert in enumerate(experts(layer)):
        assert not expert[0].weight.requires_grad
        expert.requires_grad_(True)
        flags = [e[0].weight.requires_grad for e in experts(layer)]
        assert flags == [True] * (index + 1) + [False] * (3 - index) and stack.requires_grad
    run(layer)  # all of them again


def test_partly_frozen_is_an_error() -> None:
    layer = one().moe[0]
    experts(layer)[1][0].bias.requires_grad_(False)
    message = r"0.bias must be frozen in all local experts or in none.* got \[1\] of 4.*stack_expe"
    with pytest.raises(ValueError, match=message):
        run(layer)
    layer.deepspeed_moe.configure(comet_ds.CometConfig(stack_experts=False))
    run(layer)
    assert [expert[0].bias.grad is None for expert in experts(layer)] == [False, True, False, False]


def check_partly_frozen(rank: int, size: int, frozen: list[int]) -> str:
    layer = comet_ds.MoE(HIDDEN, sequential(HIDDEN, FFN), 4, ep_size=size)
    if rank in frozen:
        experts(layer)[1].requires_grad_(False)
    with pytest.raises(ValueError, match="stack_experts") as caught:
        layer.set_deepspeed_parallelism()
    return str(caught.value)


@pytest.mark.parametrize("frozen", [[0, 1], [1]], ids=str)
def test_partly_frozen_is_an_error_on_all_ranks(world, frozen: list[int]) -> None:
    for message in world(2).run(check_partly_frozen, frozen):
        assert "frozen" in message and "[1]" in message


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["reference", "pipelined"])
@pytest.mark.parametrize("k", [1, 2])
def test_trains_as_unstacked(path: str, k: int) -> None:
    models = [
        one(k=k, comet_ds={"path": path, **block}) for block in ({}, {"stack_experts": False})
    ]
    assert_trains_alike(*models)


def test_expert_called_by_itself() -> None:
    """Gradients of a row are the stack's; without them they are zero where others have some."""
    x = torch.randn(5, HIDDEN)
    models = both()
    for model in models:
        sum(expert(x).square().sum() for expert in experts(model.moe[0])[:3]).backward()
        experts(model.moe[0])[1].zero_grad()
        experts(model.moe[0])[2].zero_grad(set_to_none=False)
    found, expected = (grads(experts(model.moe[0])) for model in models)
    assert expected["0.0.weight"].any() and expected["1.0.weight"] is None
    for name, grad in expected.items():
        assert torch.equal(found[name], torch.zeros_like(found[name]) if grad is None else grad)
    models[0].zero_grad()
    assert experts(models[0].moe[0])[0][0].weight.grad is None


def test_clipping_one_expert() -> None:
    models = both()
    for model in models:
        run(model)
        nn.utils.clip_grad_norm_(experts(model.moe[0])[1].parameters(), 1e-3)
    assert_same(*(grads(model) for model in models))


def test_hooks() -> None:
    """A stack's hooks run once a backward, with the whole gradient; a row has none."""
    layer, fired, whole = one().moe[0], [], []
    stack = stacks(layer)["0.weight"]
    stack.register_post_accumulate_grad_hook(lambda p: fired.append(p.grad.clone()))
    stack.register_hook(whole.append)
    run(layer)
    assert len(fired) == len(whole) == 1 and fired[0].is_contiguous()
    assert torch.equal(fired[0], stack.grad) and torch.equal(whole[0], stack.grad)
    row = experts(layer)[1][0].weight
    for register in (row.register_hook, row.register_post_accumulate_grad_hook):
        with pytest.raises(RuntimeError, match=r"hook on its stack.*\(4, 32, 16\).*stack_experts"):
            register(print)


def test_functional_call() -> None:
    model = one()
    x, target = torch.randn(2, 6, HIDDEN), torch.randn(2, 6, HIDDEN)

    def loss(params: dict[str, torch.Tensor]) -> torch.Tensor:
        torch.manual_seed(0)
        return torch.func.functional_call(model, params, (x, target))

    params = {name: p.detach() * 2 for name, p in model.named_parameters()}
    for param in params.values():
        param.requires_grad_()
    loss(params).backward()
    found = {name: p.grad for name, p in params.items()}
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(2)
    torch.manual_seed(0)
    model(x, target).backward()
    assert_same(found, {name: p.grad for name, p in model.named_parameters()})
    assert all(layer.deepspeed_moe.experts.is_stacked for layer in model.moe)


def test_functional_call_of_an_expert() -> None:
    layer = one().moe[0]
    expert, before = experts(layer)[1], values(layer)
    zeros = {name: torch.zeros_like(p) for name, p in expert.named_parameters()}
    for other in (zeros, dict(experts(layer)[0].named_parameters())):
        with pytest.raises(RuntimeError, match=r"is a view of a stack.*stack_experts"):
            torch.func.functional_call(expert, other, (torch.randn(2, HIDDEN),))
    own = dict(expert.named_parameters())
    torch.func.functional_call(expert, own, (torch.randn(2, HIDDEN),)).sum().backward()
    assert layer.deepspeed_moe.experts.is_stacked
    assert_same(before, values(layer))
