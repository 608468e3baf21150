# SPDX-License-Identifier: Apache-2.0
"""A user's optimizer and ZeRO, and the "comet_ds" block under plain ``deepspeed.initialize``."""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.moe.utils import is_moe_param, split_params_into_different_moe_groups_for_optimizer
from deepspeed.utils import logger
from helpers.tolerance import assert_few_steps
from helpers.training import CLASSES, Model, config, train
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, SequentialLR, StepLR

import comet_ds

# ---- groups ------------------------------------------------------------------------------------


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """As Hugging Face's Trainer makes them: without names, by weight decay."""
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0, "lr": 3e-3},
    ]


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups_of(model), lr=1e-2)


SCHEDULERS = {
    "lambda": lambda o: LambdaLR(o, [lambda step: 1 / (1 + step), lambda step: 0.5**step]),
    "sequential": lambda o: SequentialLR(o, [StepLR(o, 1, 0.5), LambdaLR(o, lambda s: 0.1)], [2]),
    "deepspeed's": lambda o: deepspeed.runtime.lr_schedules.WarmupLR(o, 1e-3, [1e-2, 3e-3], 4),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_split_groups_train_as_before(name: str) -> None:
    """With state of steps before, and rates that go on from there."""
    runs = []
    for splits in (False, True):
        torch.manual_seed(0)
        model = Model(comet_ds.MoE, k=2)
        optimizer = adamw(model)
        scheduler, losses, rates = SCHEDULERS[name](optimizer), [], []
        for step in range(6):
            if splits and step == 2:
                assert comet_ds.split_expert_groups(optimizer, scheduler) is optimizer
                again = [dict(group) for group in optimizer.param_groups]
                comet_ds.split_expert_groups(optimizer)  # does nothing more
                assert [g.keys() for g in again] == [g.keys() for g in optimizer.param_groups]
            torch.manual_seed(step)
            loss = model(*torch.randn(2, 3, 12, 16))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
            rates.append(sorted({(g["weight_decay"], g["lr"]) for g in optimizer.param_groups}))
        runs.append((losses, rates, optimizer, model))
    (losses, rates, before, _), (got, got_rates, after, model) = runs
    assert got == losses and got_rates == rates
    assert len(before.param_groups) == 2 and len(after.param_groups) == 4
    for group in after.param_groups:
        assert {is_moe_param(p) for p in group["params"]} == {group.get("moe", False)}
        assert group.get("name") == ("ep_size_1" if group.get("moe") else None)
    held = [id(p) for g in after.param_groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


def test_a_scheduler_that_was_not_given_is_missed() -> None:
    optimizer = adamw(Model(comet_ds.MoE))
    LambdaLR(optimizer, lambda step: 0.5)
    with pytest.raises(ValueError, match="or the scheduler must be given as lr_scheduler"):
        comet_ds.split_expert_groups(optimizer)


# ---- engines -----------------------------------------------------------------------------------

FORMS = ["optimizer", "with scheduler", "function", "groups of parameters"]


def build(kind: str, stage: int, size: int, form: str, stack: bool, initialize: Any) -> Any:
    torch.manual_seed(0)
    options = {"comet_ds": {"stack_experts": stack}} if kind == "comet_ds" else {}
    model = Model(CLASSES[kind], ep_size=size, k=2, **options)
    settings = config(size, zero_optimization={"stage": stage})
    if form == "groups of parameters":
        given = {"model_parameters": groups_of(model)}
        if kind == "deepspeed":
            for index, group in enumerate(given["model_parameters"]):
                group["name"] = f"group {index}"
        return initialize(model=model, config=settings, **given)
    del settings["optimizer"]
    if kind == "deepspeed":  # by hand
        groups = [{**g, "name": str(i)} for i, g in enumerate(groups_of(model))]
        groups = split_params_into_different_moe_groups_for_optimizer(groups)
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=1e-2)
    else:
        optimizer = adamw(model)
    given = {"optimizer": optimizer}
    if form == "with scheduler":
        given["lr_scheduler"] = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    if form == "function" and kind == "comet_ds":
        given = {"optimizer": lambda _: adamw(model)}
    return initialize(model=model, config=settings, **given)[0]


def check_curves(rank: int, size: int, form: str, stage: int, stack: bool) -> None:
    engines = [
        build(kind, stage, size, form, stack, initialize)
        for kind, initialize in (
            ("deepspeed", deepspeed.initialize),
            ("comet_ds", comet_ds.initialize),
            ("deepspeed", deepspeed.initialize),
        )
    ]
    engines = [engine[0] if isinstance(engine, tuple) else engine for engine in engines]
    expected, got = (train(engine, rank, 6) for engine in engines[:2])
    assert_few_steps(got, expected, train(engines[2], rank, 6, disturbance=1), form)
    rates = [{g["lr"] for g in engine.optimizer.param_groups} for engine in engines]
    assert rates[0] == rates[1]


@pytest.mark.parametrize("stack", [True, False], ids=["stacked", "one per expert"])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_users_optimizer_with_zero(world, form: str, stage: int, stack: bool) -> None:
    world(2).run(check_curves, form, stage, stack)


def check_plain(rank: int, size: int, stage: int, form: str) -> str:
    """Plain ``deepspeed.initialize`` names the remedy, which then works."""
    try:
        build("comet_ds", stage, size, form, True, deepspeed.initialize)
    except ValueError as error:
        message = str(error)
    else:
        message = "no error"

    def remedied(**given: Any) -> Any:
        comet_ds.split_expert_groups(given["optimizer"], given.get("lr_scheduler"))
        return deepspeed.initialize(**given)

    if form != "function":
        losses = train(build("comet_ds", stage, size, form, True, remedied), rank, 2)
        assert losses[-1] == losses[-1]
    return message


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("form", FORMS[:3])
def test_plain_initialize_names_the_remedy(world, form: str, stage: int) -> None:
    for message in world(2).run(check_plain, stage, form):
        assert "got 8 expert parameters in others: call comet_ds.initialize" in message
        assert "comet_ds.split_expert_groups(optimizer)" in message


def check_unnamed_groups(rank: int, size: int, stage: int) -> None:
    """Of an optimizer in the JSON, as Accelerate hands them on; DeepSpeed itself wants names."""
    engine = build("comet_ds", stage, size, "groups of parameters", True, deepspeed.initialize)[0]
    losses = train(engine, rank, 6)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_groups_without_names(world, stage: int) -> None:
    world(2).run(check_unnamed_groups, stage)


# ---- the block under plain deepspeed.initialize ------------------------------------------------


def check_block(rank: int, size: int) -> dict[str, Any]:
    said: list[str] = []
    logger.warning, original = lambda message, *_: said.append(str(message)), logger.warning
    try:
        model = Model(comet_ds.MoE, ep_size=size, k=2)
        block = {"path": "reference", "stack_experts": False, "metrics_interval": 3}
        settings = config(size, comet_ds=block)
        engine = deepspeed.initialize(model=model, config=settings)[0]
        train(engine, rank, 1)
    finally:
        logger.warning = original
    layer = model.moe[1].deepspeed_moe
    with pytest.raises(ValueError, match="unknown key 'pth'"):
        bad = config(size, comet_ds={"pth": "auto"})
        deepspeed.initialize(model=Model(comet_ds.MoE, ep_size=size), config=bad)
    with pytest.raises(RuntimeError, match='"fused" is pinned and cannot run'):
        pinned = config(size, comet_ds={"path": "fused"})
        other = Model(comet_ds.MoE, ep_size=size)
        train(deepspeed.initialize(model=other, config=pinned)[0], rank, 1)
    lines = [line for line in said if "comet_ds.initialize" in line]
    return {"path": layer.path, "stacked": layer.experts.is_stacked, "lines": lines}


def test_block_under_plain_initialize(world) -> None:
    for found in world(2).run(check_block):
        assert found["path"] == "reference" and not found["stacked"]
        assert len(found["lines"]) == 1 and "metrics_interval of the" in found["lines"][0]
