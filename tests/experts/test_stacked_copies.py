# SPDX-License-Identifier: Apache-2.0
"""Stacked experts: copying, moving averages, converting."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from helpers.experts_zoo import TiedMLP
from helpers.layouts import (
    COPIES,
    MARGIN_BYTES,
    assert_same,
    assert_trains_alike,
    both,
    experts,
    file_size,
    layers,
    one,
    run,
    stacks,
    values,
)
from helpers.training import HIDDEN, Model
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import comet_ds

# ---- copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_of_models(copied) -> None:
    """After a training step, whose graph and gradients a copy has not."""
    models = both()
    for model in models:
        run(model)
    copies = [copied(model) for model in models]
    for made, original in zip(copies, models, strict=True):
        assert_same(values(made), values(original))
        for layer in made.moe:
            for param in layer.deepspeed_moe.experts.parameters():
                assert (param.allreduce, param.group_name) == (False, "ep_size_1")
                assert param.grad is None
    assert [layer.deepspeed_moe.experts.is_stacked for layer in copies[0].moe] == [True, True]
    assert not copies[1].moe[0].deepspeed_moe.experts.is_stacked
    for model in models:
        model.zero_grad()
    before = values(models[0])
    assert_trains_alike(*copies)
    assert_same(before, values(models[0]))
    assert_trains_alike(*models)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_of_one_expert(copied) -> None:
    """It needs nothing of the layer."""
    layer = one().moe[0]
    before, expert = values(layer), experts(layer)[2]
    expected = values(expert)
    expert[0].requires_grad_(False)
    for made, path in ((copied(expert), ""), (copied(expert[0]), "0.")):
        assert_same(
            values(made), {n.removeprefix(path): v for n, v in expected.items() if path in n}
        )
        params = dict(made.named_parameters())
        assert {type(p) for p in params.values()} == {nn.Parameter}
        flags = {n: p.requires_grad for n, p in params.items()}
        assert flags == {n: path == "" and n.startswith("3") for n in params}
        with torch.no_grad():
            next(made.parameters()).zero_()
        made.requires_grad_(True).bfloat16()
        torch.optim.SGD(made.parameters(), lr=1.0)
        made(torch.randn(3, HIDDEN).bfloat16()).sum().backward()
    expert[0].requires_grad_(True)
    assert_same(before, values(layer))
    weight = copied(expert[0].weight)
    assert type(weight) is nn.Parameter and torch.equal(weight, expert[0].weight)
    made = comet_ds.MoE(HIDDEN, copied(expert), 3)  # the start of another layer
    assert all(torch.equal(e[3].weight, expert[3].weight) for e in experts(made))
    assert made.deepspeed_moe.experts.is_stacked
    run(made)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copied_experts_have_the_tags_of_unstacked_ones(copied) -> None:
    made = [copied(experts(model.moe[0])[1]) for model in both()]
    found, expected = ([vars(p) for p in expert.parameters()] for expert in made)
    assert found == expected


@pytest.mark.parametrize("is_model_first", [True, False])
def test_copies_of_model_and_optimizer(is_model_first: bool) -> None:
    model = one()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run(model)
    optimizer.step()
    pair = (model, optimizer) if is_model_first else (optimizer, model)
    made = copy.deepcopy(pair)
    made_model, made_optimizer = made if is_model_first else made[::-1]
    held = {id(p) for group in made_optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in made_model.parameters()}
    for m, o in ((model, optimizer), (made_model, made_optimizer)):
        o.zero_grad()
        run(m)
        o.step()
    assert_same(values(model), values(made_model))
    assert stacks(made_model.moe[0])["0.weight"].group_name == "ep_size_1"


def test_copies_of_state_dicts() -> None:
    stacked, unstacked = both()
    made = copy.deepcopy(stacked.state_dict())
    expected = values(unstacked)
    assert_same(dict(made), expected)
    part = copy.deepcopy(experts(stacked.moe[0])[1].state_dict())
    assert all(v.untyped_storage().nbytes() == v.nbytes for v in part.values())
    with torch.no_grad():
        for value in itertools.chain(made.values(), part.values()):
            value.zero_()
    assert_same(values(stacked), expected)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_tied_parameters_stay_tied(copied) -> None:
    layer, unstacked = layers(TiedMLP(HIDDEN))
    assert list(stacks(layer)) == ["up.weight"]
    assert len(list(experts(layer)[1].parameters())) == 1
    assert list(layer.state_dict()) == list(unstacked.state_dict())
    assert list(stacks(copied(layer))) == ["up.weight"]
    expert = copied(experts(layer)[1])
    assert expert.up.weight is expert.down.weight
    assert_trains_alike(copied(layer), unstacked)
    assert abs(file_size(layer) - file_size(unstacked)) < MARGIN_BYTES


# ---- moving averages -----------------------------------------------------------------------------


def ema_of_torch(model: Model) -> list[Model]:
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    yield averaged.module
    while True:
        averaged.update_parameters(model)
        yield averaged.module


def ema_of_parameters(model: Model):
    made = copy.deepcopy(model).requires_grad_(False)
    yield made
    while True:
        with torch.no_grad():
            for average, param in zip(made.parameters(), model.parameters(), strict=True):
                average.lerp_(param, 0.1)
        yield made


def ema_of_state_dicts(model: Model):
    made = copy.deepcopy(model)
    yield made
    while True:
        with torch.no_grad():
            for name, average in made.state_dict().items():
                average.mul_(0.9).add_(model.state_dict()[name], alpha=0.1)
        yield made


def ema_of_copied_state_dict(model: Model):
    made, average = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    yield made
    while True:
        for name, value in model.state_dict().items():
            average[name] = 0.9 * average[name] + 0.1 * value
        made.load_state_dict(average)
        yield made


@pytest.mark.parametrize(
    "ema", [ema_of_torch, ema_of_parameters, ema_of_state_dicts, ema_of_copied_state_dict]
)
def test_moving_averages(ema) -> None:
    models = both()
    averages = [ema(model) for model in models]
    for average in averages:
        next(average)
    for _ in range(3):
        assert_trains_alike(*models, steps=1)
        found = [next(average) for average in averages]
    assert_same(*(values(made) for made in found))
    assert not torch.equal(
        experts(found[0].moe[0])[1][0].weight, experts(models[0].moe[0])[1][0].weight
    )


# ---- converting ----------------------------------------------------------------------------------


def as_deepspeed_does(model: Model) -> None:
    for param in model.parameters():
        param.data = param.data.to(torch.bfloat16)


def as_flat_groups_are(model: Model) -> None:
    """ZeRO moves parameters into one buffer."""
    params = list(model.parameters())
    flat = torch.cat([p.data.flatten() for p in params])
    for param, part in zip(params, flat.split([p.numel() for p in params]), strict=True):
        param.data = part.view(param.shape)


CONVERSIONS = {
    "bfloat16": lambda model: model.bfloat16(),
    "half": lambda model: model.half(),
    "double": lambda model: model.double(),
    "to": lambda model: model.to("cpu", torch.bfloat16),
    "to a layer's experts": lambda model: [m.deepspeed_moe.experts.double() for m in model.moe],
    "data =": as_deepspeed_does,
    "flat": as_flat_groups_are,
    "share_memory": lambda model: model.share_memory(),
}


def set_nothing(_: bool) -> None:
    pass


# How torch converts: into the parameter, into a new one, or by exchanging what is in it.
WAYS = {
    "in place": set_nothing,
    "new": torch.__future__.set_overwrite_module_params_on_conversion,
    "swapped": torch.__future__.set_swap_module_params_on_conversion,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CONVERSIONS)
def test_converting(name: str, way: str) -> None:
    models = both()
    WAYS[way](True)
    try:
        for model in models:
            CONVERSIONS[name](model)
    finally:
        WAYS[way](False)
    assert_same(*(values(model) for model in models))
    layer = models[0].moe[1]
    for key, stack in stacks(layer).items():
        row = experts(layer)[3].get_parameter(key)
        assert row.data_ptr() == stack.view(4, -1)[3].data_ptr() and row.dtype == stack.dtype
        assert stack.group_name == "ep_size_1"
    if name not in ("to a layer's experts", "half"):
        assert_trains_alike(*models)


def test_converting_an_expert_alone_is_an_error() -> None:
    layer = one().moe[0]
    expert, before = experts(layer)[1], values(layer)
    for convert in (
        expert.bfloat16,
        expert[0].half,
        lambda: expert.to("meta"),
        lambda: expert.to(torch.float64),
        experts(layer).double,
    ):
        message = "cannot be converted by itself, from torch.float32 on cpu to .*stack_experts"
        with pytest.raises(RuntimeError, match=message):
            convert()
    with pytest.raises(RuntimeError, match=r"stays \(32, 16\), torch.float32 .*stack_experts"):
        expert[0].weight.data = expert[0].weight.data.bfloat16()
    with pytest.raises(RuntimeError, match=r"stays \(32, 16\), .* got \(16, 32\).*stack_experts"):
        expert[0].weight.data = expert[0].weight.data.t()
    expert.to("cpu", torch.float32).float()  # nothing to do
    assert_same(before, values(layer))
