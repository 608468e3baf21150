# SPDX-License-Identifier: Apache-2.0
"""Optimizers of stacked experts: the same to the bit, or one parameter per expert and a reason."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split
from helpers.checkpointing import (
    EP1,
    EP2,
    MUON,
    SGD,
    SPLIT,
    assert_same,
    assert_same_files,
    build,
    load,
    machine,
)
from helpers.tolerance import assert_few_steps
from helpers.training import BF16, CLASSES, Model, config, train, zero
from torch import nn

from comet_ds.zero import optimizer_choice
from comet_ds.zero.optimizer_choice import stacked_experts

STEPS = 20
ADAGRAD = {"optimizer": {"type": "Adagrad", "params": {"lr": 1e-2}}}
ADAFACTOR = {"optimizer": {"type": "Adafactor", "params": {"lr": 1e-2}}}
CLIP = {"gradient_clipping": 0.1}


class Lamb(torch.optim.Optimizer):
    """Momentum, scaled by the norms of the whole parameter and its update."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    momentum = self.state[param].setdefault("momentum", torch.zeros_like(param))
                    momentum.mul_(0.9).add_(param.grad)
                    scale = param.norm() / momentum.norm().clamp(min=1e-12)
                    param.sub_(group["lr"] * scale * momentum)


class Lion(torch.optim.Optimizer):
    """The sign of an average, as DeepSpeed's kernels for Lion compute it."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                average = self.state[param].setdefault("exp_avg", torch.zeros_like(param))
                update = average.lerp(param.grad, 0.1).sign()
                param.mul_(1 - group["lr"] * 0.01).sub_(update, alpha=group["lr"])
                average.lerp_(param.grad, 0.01)


class OwnAdamW(torch.optim.AdamW):
    """A user's subclass, which may compute anything."""


# ---- by element: as with one parameter per expert ----------------------------------------------

BY_ELEMENT: dict[str, tuple] = {
    "AdamW, ZeRO 0": (zero(0), EP2),
    "AdamW, ZeRO 1, replicas": (zero(1), EP1),
    "AdamW, ZeRO 2": (zero(2), EP2),
    "AdamW, ZeRO 1, clipping": ({**zero(1), **CLIP}, EP2),
    "AdamW, ZeRO 2, bf16": ({**zero(2), **BF16}, EP2),
    "SGD, ZeRO 2": ({**zero(2), **SGD}, EP2),
    "Adagrad, ZeRO 0": ({**zero(0), **ADAGRAD}, EP2),
    "Lion, ZeRO 0": (zero(0), EP2, "Lion"),
}


def train_both(
    rank: int,
    size: int,
    kinds: tuple[str, str],
    settings: dict,
    options: dict,
    is_stacked: bool,
    is_noisy: bool = False,
    **arguments: Any,
) -> tuple[list[list[float]], list[dict[str, Any]]]:
    """Return loss curves and final weights of two kinds of layers.

    Args:
        is_stacked: whether comet_ds is to keep the stacks.
        is_noisy: whether to return those of the first kind with noise, too.
    """
    dtype = torch.bfloat16 if "bf16" in settings else torch.float32
    curves, weights = [], []
    runs = [(kinds[0], 0), (kinds[1], 0), (kinds[0], 1)]
    for kind, disturbance in runs if is_noisy else runs[:2]:
        engine = build(kind, size, settings, options, **arguments)
        assert bool(stacked_experts(engine.module)) == (is_stacked and kind == "comet_ds")
        curves.append(train(engine, rank, STEPS, dtype, disturbance))
        weights.append({k: v.clone() for k, v in engine.module.state_dict().items()})
        engine.destroy()
    assert curves[0][-1] < curves[0][0], "it does not learn"
    return curves, weights


def make_lion(model: nn.Module) -> torch.optim.Optimizer:
    return Lion(model.parameters())


def check_bits(
    rank: int, size: int, settings: dict, options: dict, client: str | None = None
) -> None:
    arguments = {} if client is None else {"optimizer": make_lion}
    optimizer_choice.ELEMENTWISE.add(f"{Lion.__module__}.Lion")
    try:
        kinds = "unstacked", "comet_ds"
        curves, weights = train_both(rank, size, kinds, settings, options, True, **arguments)
    finally:
        optimizer_choice.ELEMENTWISE.discard(f"{Lion.__module__}.Lion")
    assert curves[0] == curves[1]
    assert_same(*weights, "weights")


@pytest.mark.parametrize("name", BY_ELEMENT)
def test_by_element_stacks_train_to_the_same_bits(world, name: str) -> None:
    world(2).run(check_bits, *BY_ELEMENT[name])


def check_clipping(rank: int, size: int) -> None:
    kinds = "unstacked", "comet_ds"
    (expected, got, noisy), _ = train_both(rank, size, kinds, {**zero(0), **CLIP}, EP2, True, True)
    assert_few_steps(got, expected, noisy, "clipping")


def test_clipping_at_zero_0_adds_norms_in_another_order(world) -> None:
    world(2).run(check_clipping)


# ---- by parameter: as with DeepSpeed's layer ---------------------------------------------------


def make_lamb(model: nn.Module) -> torch.optim.Optimizer:
    return Lamb(model.parameters())


def give_lamb(model: nn.Module) -> Callable[[Any], torch.optim.Optimizer]:
    return Lamb


def check_parity(
    rank: int, size: int, settings: dict, options: dict, is_stacked: bool, make: Any
) -> None:
    arguments = {} if make is None else {"optimizer": make}
    kinds = "deepspeed", "comet_ds"
    curves, _ = train_both(rank, size, kinds, settings, options, is_stacked, True, **arguments)
    assert_few_steps(curves[1], curves[0], curves[2], "as DeepSpeed's layer")


PARITY: dict[str, tuple] = {
    "Muon, ZeRO 1, on stacks": ({**zero(1), **MUON}, EP2, True, None),
    "Muon, ZeRO 2, replicas": ({**zero(2), **MUON}, EP1, True, None),
    "Adafactor": ({**zero(0), **ADAFACTOR}, EP2, False, None),
    "a client's LAMB": (zero(0), EP2, False, make_lamb),
    "a function that makes LAMB": (zero(0), EP2, False, give_lamb),
}


@pytest.mark.parametrize("name", PARITY)
def test_by_parameter_as_deepspeeds_layer(world, name: str) -> None:
    world(2).run(check_parity, *PARITY[name])


# ---- the choice --------------------------------------------------------------------------------


def client(cls: type, model: nn.Module) -> torch.optim.Optimizer:
    """Return an optimizer as users make it before ``deepspeed.initialize``."""
    return cls(model.parameters(), lr=1e-3)


def maker(cls: type, model: nn.Module) -> Callable[[Any], torch.optim.Optimizer]:
    """Return a function that DeepSpeed calls with the parameters."""
    return functools.partial(cls, lr=1e-3)


def muon_maker(model: nn.Module) -> Callable[[Any], torch.optim.Optimizer]:
    """Return one whose optimizer, torch's Muon, refuses what is not a matrix."""
    return lambda params: torch.optim.Muon([p for p in params if p.dim() > 1], lr=1e-3)


def check_choice(rank: int, size: int, make: Any, settings: dict, reason: str | None) -> None:
    arguments = {} if make is None else {"optimizer": make}
    engine = build("comet_ds", size, settings, EP2, **arguments)
    experts = engine.module.moe[0].deepspeed_moe.experts
    assert experts.reason is None if reason is None else reason in experts.reason
    assert bool(stacked_experts(engine.module)) == (reason is None)
    names = {id(p): name for name, p in engine.module.named_parameters()}
    assert {id(p): name for p, name in engine.param_names.items()} == names
    before = experts.deepspeed_experts[1][0].weight.detach().clone()
    train(engine, rank, 2)
    assert not torch.equal(before, experts.deepspeed_experts[1][0].weight), "it is not trained"


WHOLE = "may compute something from whole parameters"


@pytest.mark.parametrize(
    ("make", "settings", "reason"),
    [
        (None, zero(0), None),
        (functools.partial(client, torch.optim.NAdam), zero(0), None),
        (functools.partial(maker, torch.optim.RMSprop), zero(0), None),
        (functools.partial(client, torch.optim.Adafactor), zero(0), WHOLE),
        (functools.partial(maker, torch.optim.Adafactor), zero(0), WHOLE),
        (functools.partial(client, OwnAdamW), zero(0), WHOLE),
        (muon_maker, zero(0), "refuses stacks"),
        (None, {**zero(0), **ADAFACTOR}, WHOLE),
        (None, zero(1, elastic_checkpoint=True), "elastic_checkpoint"),
    ],
    ids=str,
)
def test_choice(world, make: Any, settings: dict, reason: str | None) -> None:
    world(2).run(check_choice, make, settings, reason)


@pytest.mark.parametrize("name", ["lamb", "onebitadam", "zerooneadam", "onebitlamb", "muadam"])
def test_optimizers_of_the_json_that_work_on_whole_parameters(name: str) -> None:
    """DeepSpeed has none of them on a CPU."""
    engine = SimpleNamespace(optimizer_name=lambda: name)
    assert WHOLE in optimizer_choice._reason_of_name(engine)


def test_zenflow_needs_one_parameter_per_expert() -> None:
    assert "ZenFlow" in optimizer_choice._reason_of_engine(SimpleNamespace(zenflow=True))


def check_late(rank: int, size: int) -> None:
    """An optimizer that has begun cannot be given other parameters."""

    def begun(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = torch.optim.Adafactor(model.parameters(), lr=1e-3)
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
        return optimizer

    with pytest.raises(ValueError, match='set "stack_experts" to false'):
        build("comet_ds", size, zero(0), EP2, optimizer=begun)


def test_an_optimizer_with_states_of_stacks_is_refused(world) -> None:
    world(2).run(check_late)


# ---- groups of the user's ----------------------------------------------------------------------


def by_decay(model: nn.Module) -> torch.optim.Optimizer:
    """Return AdamW over groups as DeepSpeed's documentation makes them."""
    params = list(model.parameters())
    groups = [
        {"name": "decay", "params": [p for p in params if p.dim() > 1], "weight_decay": 0.1},
        {"name": "others", "params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = split(groups)
    assert all(group["params"] for group in groups)
    return torch.optim.AdamW(groups, lr=1e-2)


def decreasing(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def check_groups(rank: int, size: int, folder: str, stage: int) -> None:
    def make(kind: str) -> Any:
        torch.manual_seed(0)
        model = Model(CLASSES[kind], **EP1)
        optimizer = by_decay(model)
        counts[kind] = len(optimizer.param_groups)
        engine = deepspeed.initialize(
            model=model,
            config=config(size, **zero(stage)),
            optimizer=optimizer,
            lr_scheduler=decreasing(optimizer),
        )[0]
        assert len(engine.basic_optimizer.param_groups) == counts[kind]
        return engine

    counts: dict[str, int] = {}
    with machine(SPLIT["limit"], torch.float32):
        engine = make("deepspeed")
        train(engine, rank, 3)
        engine.save_checkpoint(folder, tag="theirs")
        expected = train(engine, rank, 3)
        rate = engine.get_lr()[0]
        engine.destroy()
        engine = load(make("deepspeed"), folder, "theirs")
        engine.save_checkpoint(folder, tag="again")
        noisy = train(engine, rank, 3, disturbance=1)
        engine.destroy()
        engine = load(make("comet_ds"), folder, "theirs")
        engine.save_checkpoint(folder, tag="ours")
        assert counts["comet_ds"] != counts["deepspeed"]
        torch.distributed.barrier()
        assert_same_files(folder, "again", "ours")
        got = train(engine, rank, 3)
        assert engine.get_lr() == [rate] * counts["comet_ds"]
    assert_few_steps(got, expected, noisy, "theirs -> comet_ds")


@pytest.mark.skipif(
    "ds_numel" not in inspect.getsource(split),
    reason="this DeepSpeed leaves an empty group before a parameter above its limit",
)
@pytest.mark.parametrize("stage", [0, 1])
def test_groups_and_learning_rates_of_the_user(world, tmp_path: Path, stage: int) -> None:
    world(2).run(check_groups, str(tmp_path), stage)
