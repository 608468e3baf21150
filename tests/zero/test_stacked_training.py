# SPDX-License-Identifier: Apache-2.0
"""Stacked experts under DeepSpeed's engine: users' optimizers, options, profilers, adapters."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split
from deepspeed.profiling.flops_profiler import FlopsProfiler
from helpers.experts_zoo import GatedMLP
from helpers.layouts import (
    LAYOUTS,
    assert_same,
    assert_trains_alike,
    both,
    built,
    experts,
    one,
    stacks,
    trained,
    values,
)
from helpers.odd_experts import STACKED
from helpers.parity import VARIANTS
from helpers.training import FFN, HIDDEN, NUM_EXPERTS, Model, config, train
from torch import nn

import comet_ds
from comet_ds.experts import stackable
from comet_ds.experts.unstacked import unstacked_parameters
from comet_ds.observe.flops import flop_per_token

STEPS = 4
INITIALIZE = {"deepspeed": deepspeed.initialize, "comet_ds": comet_ds.initialize}

# ---- optimizers ----------------------------------------------------------------------------------


def from_the_json(model: Model) -> dict[str, Any]:
    return {}


def parameters(model: Model) -> dict[str, Any]:
    return {"model_parameters": [p for p in model.parameters() if p.requires_grad]}


def groups(model: Model) -> list[dict[str, Any]]:
    """Weight decay by name and by number of dimensions, as training scripts have it."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    found = [
        {
            "name": "matrices",
            "params": [p for n, p in named if p.dim() > 1 and "bias" not in n],
            "weight_decay": 0.1,
        },
        {"name": "rest", "params": [p for n, p in named if p.dim() < 2 or n.endswith("bias")]},
    ]
    assert sum(len(g["params"]) for g in found) == len(named)
    return split(found)


def parameter_groups(model: Model) -> dict[str, Any]:
    return {"model_parameters": groups(model)}


def optimizer(model: Model) -> dict[str, Any]:
    return {"optimizer": torch.optim.AdamW(groups(model), lr=1e-2, weight_decay=0.0)}


def optimizer_function(model: Model) -> dict[str, Any]:
    return {
        **parameter_groups(model),
        "optimizer": lambda params: torch.optim.AdamW(params, lr=1e-2),
    }


GIVEN = [from_the_json, parameters, parameter_groups, optimizer, optimizer_function]


def check_layouts(
    rank: int, size: int, give: Callable[[Model], dict], stage: int, how: str
) -> None:
    """Train the same with stacks, with constructor's option, and with a block that unstacks."""
    results = {}
    for layout, option in {**LAYOUTS, "unstacked by the block": {}}.items():
        settings = config(size, zero_optimization={"stage": stage})
        if give in (optimizer, optimizer_function):
            del settings["optimizer"]
        if "block" in layout:
            if how == "deepspeed":
                continue
            settings["comet_ds"] = {"stack_experts": False}
        model = one(ep_size=size, k=2, comet_ds=option)
        engine = INITIALIZE[how](model=model, config=settings, **give(model))[0]
        before = values(engine.module)
        losses = train(engine, rank, STEPS)
        results[layout] = losses, values(engine.module)
        assert model.moe[1].deepspeed_moe.experts.is_stacked == (layout == "stacked")
        after = results[layout][1]
        assert not [n for n in after if torch.equal(after[n], before[n])], "not trained"
        engine.destroy()
    for layout, (losses, weights) in results.items():
        assert losses == results["unstacked"][0], layout
        assert_same(weights, results["unstacked"][1])


@pytest.mark.parametrize("how", INITIALIZE)
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("give", GIVEN)
def test_optimizers(world, give: Callable[[Model], dict], stage: int, how: str) -> None:
    world(2).run(check_layouts, give, stage, how)


@pytest.mark.parametrize("is_frozen", [False, True])
def test_optimizer_of_one_expert_is_an_error(is_frozen: bool) -> None:
    layer = one().moe[0].requires_grad_(not is_frozen)
    message = "cannot take the parameters of single experts.*the layer's parameters.*stack_experts"
    for params in (experts(layer)[1].parameters(), experts(layer).parameters()):
        with pytest.raises(ValueError, match=message):
            torch.optim.AdamW(params)


def test_unstacked_parameters_have_the_models_order() -> None:
    """Also where two layers' stacks are neighbours."""
    model = one()
    params, of_experts = list(model.parameters()), []
    for layer in model.moe:
        of_experts += stacks(layer).values()
    assert unstacked_parameters(params) == params
    for layer in model.moe:
        layer.deepspeed_moe.configure(comet_ds.CometConfig(stack_experts=False))
    assert list(map(id, unstacked_parameters(params))) == list(map(id, model.parameters()))
    expected = [id(p) for layer in model.moe for p in experts(layer).parameters()]
    assert list(map(id, unstacked_parameters(of_experts))) == expected
    assert unstacked_parameters([{"params": []}]) == [{"params": []}]


def test_unstacked_parameters_are_those_in_use() -> None:
    layer = one().moe[0]
    params = list(layer.parameters())
    experts(layer)[1][0] = nn.Linear(HIDDEN, FFN)
    layer.deepspeed_moe.experts.unstack_if_replaced()
    new = {id(p) for p in experts(layer)[1][0].parameters()}
    expected = [id(p) for p in layer.parameters() if id(p) not in new]
    assert list(map(id, unstacked_parameters(params))) == expected


def test_register_elsewhere_is_an_error() -> None:
    """As AutoTP does, and parametrizations of torch."""
    for is_frozen in (False, True):
        expert = experts(one().requires_grad_(not is_frozen).moe[0])[1]
        with pytest.raises(RuntimeError, match=r"cannot be another module's.*stack_experts"):
            nn.Linear(1, 1).weight = expert[0].weight
        with pytest.raises(RuntimeError, match=r"cannot be another module's.*stack_experts"):
            nn.utils.parametrizations.orthogonal(expert[0])
        nn.Linear(1, 1).weight = nn.Parameter(expert[0].weight.detach().clone())


def test_groups_are_never_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed leaves one before a parameter that is larger than a group may be."""
    limit = NUM_EXPERTS * FFN * HIDDEN - 1
    monkeypatch.setattr(stackable, "MAX_GROUP_NUMEL", limit)
    model = one()
    groups = split({"params": list(model.parameters()), "name": "all"}, max_group_size=limit)
    assert [len(group["params"]) for group in groups] == [6, 1, 1, 1, 1, 1, 1, 1, 1]
    assert all(group["moe"] for group in groups[1:])
    by_name = [
        {"params": [p for n, p in model.named_parameters() if n.endswith(end)], "name": end}
        for end in ("weight", "bias")
    ]
    groups = split(by_name)
    assert [(g["name"], len(g["params"])) for g in groups] == [
        ("weight", 4), ("bias", 2), ("ep_size_1", 4), ("ep_size_1", 4)
    ]  # fmt: skip
    torch.optim.AdamW(groups)


def check_copy_of_a_trained_model(rank: int, size: int) -> None:
    """An average's copy is made of what the engine trains; it has to join the groups."""
    engine = comet_ds.initialize(model=one(ep_size=2), config=config(size))[0]
    train(engine, rank, 1)
    made = copy.deepcopy(engine.module)
    assert_same(values(made), values(engine.module))
    train(engine, rank, 1)
    assert not torch.equal(
        stacks(made.moe[0])["0.weight"], stacks(engine.module.moe[0])["0.weight"]
    )
    for layer in made.moe:
        layer.set_deepspeed_parallelism()
    made.load_state_dict(engine.module.state_dict())
    x, target = torch.randn(2, 8, HIDDEN), torch.randn(2, 8, HIDDEN)
    losses = []
    for model in (made, engine.module):
        torch.manual_seed(0)
        losses.append(model(x, target))
    assert torch.equal(*losses)
    torch.save(engine.module.state_dict(), file := io.BytesIO())
    assert file.tell() < 2 * sum(v.nbytes for v in values(made).values())


def test_copy_of_a_trained_model(world) -> None:
    world(4).run(check_copy_of_a_trained_model)


def check_adapters(rank: int, size: int, stage: int) -> None:
    from peft import LoraConfig, get_peft_model

    results = []
    for block in LAYOUTS.values():
        model = one(ep_size=size, comet_ds=block)
        torch.manual_seed(rank)
        adapted = get_peft_model(
            model, LoraConfig(target_modules=r".*deepspeed_experts\.\d+\.[03]", r=2)
        )
        settings = config(size, zero_optimization={"stage": stage})
        given = {"model_parameters": trained(adapted)}
        engine = comet_ds.initialize(model=adapted, config=settings, **given)[0]
        assert model.moe[0].deepspeed_moe.experts.is_stacked == (block == {})
        results.append((train(engine, rank, STEPS), values(engine.module)))
        engine.destroy()
    assert results[0][0] == results[1][0] and len(set(results[0][0])) > 1
    assert_same(results[0][1], results[1][1])


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_adapters(world, stage: int) -> None:
    pytest.importorskip("peft")
    world(2).run(check_adapters, stage)


def check_paths(rank: int, size: int, block: dict[str, Any]) -> None:
    expert, made = GatedMLP(HIDDEN, FFN, bias=True), []
    for option in LAYOUTS.values():
        options = {"ep_size": size, "k": 2, "comet_ds": {**block, **option}}
        made.append(built(expert, 3 * size, **options))
        made[-1].set_deepspeed_parallelism()
    assert_trains_alike(*made)


@pytest.mark.parametrize("variant", VARIANTS)
def test_paths_between_ranks(world, variant: str) -> None:
    world(2).run(check_paths, VARIANTS[variant])


# ---- counting and timing -------------------------------------------------------------------------


@pytest.mark.parametrize("name", STACKED)
def test_flop_per_token(name: str) -> None:
    for frozen in (False, True):
        found = []
        for block in LAYOUTS.values():
            layer = built(STACKED[name](), 4, k=2, comet_ds=block)
            experts(layer).requires_grad_(not frozen)
            found.append(flop_per_token(layer))
        assert found[0] == found[1] > 0


def profile(model: Model) -> tuple[dict[str, Any], str]:
    profiler = FlopsProfiler(model)
    profiler.start_profile()
    torch.manual_seed(0)
    model(torch.randn(2, 12, HIDDEN), torch.randn(2, 12, HIDDEN)).backward()
    profiler.stop_profile()
    totals = {
        "flops": profiler.get_total_flops(),
        "macs": profiler.get_total_macs(),
        "params": profiler.get_total_params(),
    }
    for path, module in model.named_modules():
        if "stacked" not in path:
            totals[path] = module.__flops__, module.__params__, module.__expert_params__
    with redirect_stdout(io.StringIO()) as printed:
        profiler.print_model_profile()
    profiler.end_profile()
    return totals, printed.getvalue()


def test_flops_profiler() -> None:
    (found, printed), (expected, _) = (profile(model) for model in both())
    assert_same(found, expected)
    assert found["flops"] > 0 and found["moe.0"][2] > 0
    assert "deepspeed_experts" in printed


def check_breakdown(rank: int, size: int, layout: str) -> str:
    settings = config(
        size,
        zero_optimization={"stage": 1},
        wall_clock_breakdown=True,
        flops_profiler={"enabled": True, "profile_step": 1, "detailed": False},
    )
    model = one(ep_size=size, comet_ds=LAYOUTS[layout])
    engine = comet_ds.initialize(model=model, config=settings)[0]
    with redirect_stdout(io.StringIO()) as printed:
        train(engine, rank, STEPS)
    for layer in model.moe:
        assert 0 < layer.deepspeed_moe.gate.gate_time < layer.deepspeed_moe.time_moe
    engine.destroy()
    lines = printed.getvalue().splitlines()
    return "\n".join(line for line in lines if line.startswith(("params", "number of", "fwd MACs")))


def test_breakdown_and_profiler_of_the_engine(world) -> None:
    found, expected = (world(2).run(check_breakdown, layout)[0] for layout in LAYOUTS)
    assert found == expected and "fwd MACs" in found
