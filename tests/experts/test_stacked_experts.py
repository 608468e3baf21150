# SPDX-License-Identifier: Apache-2.0
"""Any expert module, stacked or not; modules and parameters that are replaced; PEFT."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from deepspeed.utils import logger
from helpers.experts_zoo import HandWrittenMLP, sequential
from helpers.layouts import (
    UNSTACKED,
    assert_same,
    assert_trains_alike,
    built,
    experts,
    is_stacked,
    layers,
    one,
    run,
    stacks,
    values,
)
from helpers.odd_experts import PER_EXPERT, STACKED
from helpers.training import FFN, HIDDEN
from torch import Tensor, nn

import comet_ds


@pytest.mark.parametrize("num_experts", [1, 3])
@pytest.mark.parametrize("path", ["reference", "pipelined"])
@pytest.mark.parametrize("name", STACKED)
def test_experts_that_are_stacked(name: str, path: str, num_experts: int) -> None:
    expert = STACKED[name]()
    made = [
        built(expert, num_experts, comet_ds={"path": path, **block}) for block in ({}, UNSTACKED)
    ]
    stacked, unstacked = made
    assert list(map(is_stacked, made)) == [True, False]
    assert all(not n.split("deepspeed_experts.")[1:] for n, _ in stacked.named_parameters())
    assert_trains_alike(*made)
    copied = copy.deepcopy(stacked)
    assert is_stacked(copied)
    assert_same(values(copied), values(stacked))
    copied.load_state_dict(unstacked.state_dict())
    assert_same(values(copied.double()), values(unstacked.double()))


@pytest.mark.parametrize("name", PER_EXPERT)
def test_experts_that_stay_per_expert(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, why = PER_EXPERT[name]
    said = set()
    monkeypatch.setattr(logger, "log_dist_once", lambda message, **_: said.add(message))
    expert = make()
    made = [built(expert, comet_ds=block) for block in ({}, {}, UNSTACKED)]
    assert not any(map(is_stacked, made))
    assert_trains_alike(*made[1:])
    (line,) = (line for line in said if "one parameter per expert: " in line)
    assert why in line


# ---- replacing -----------------------------------------------------------------------------------


def check_replaced_module(rank: int, size: int, ranks: list[int]) -> tuple[bool, list[str]]:
    layer = comet_ds.MoE(HIDDEN, sequential(HIDDEN, FFN), 4, ep_size=size)
    if rank in ranks:
        experts(layer)[1][0] = nn.Linear(HIDDEN, FFN)
    try:
        layer.set_deepspeed_parallelism()
    except ValueError as error:
        return is_stacked(layer), [str(error)]
    names = [n for n, p in layer.named_parameters() if "expert" in n and p.allreduce is False]
    assert (
        layer.state_dict().keys()
        == comet_ds.MoE(HIDDEN, sequential(HIDDEN, FFN), 4, ep_size=size).state_dict().keys()
    )
    run(layer)
    return is_stacked(layer), names


def test_replaced_modules_are_seen_when_groups_are_made(world) -> None:
    (is_still, names), *_ = world(2).run(check_replaced_module, [])
    assert is_still and len(names) == 4
    for is_still, names in world(2).run(check_replaced_module, [0, 1]):
        assert not is_still and len(names) == 2 * 4
    (_, (message, *_)), (_, (other, *_)) = world(2).run(check_replaced_module, [1])
    assert message == other and "expert parameters are stacked must be the same" in message


def test_replaced_module_trains_without_groups() -> None:
    """The row that it had is not used."""
    layer, unstacked = layers(sequential(HIDDEN, FFN))
    for made in (layer, unstacked):
        torch.manual_seed(1)
        experts(made)[1][0] = nn.Linear(HIDDEN, FFN)
    assert is_stacked(layer)
    copies = copy.deepcopy((layer, unstacked))
    assert_trains_alike(layer, unstacked)
    assert not is_stacked(copies[0]) and is_stacked(layer)
    assert_trains_alike(*copies)


def replace_parameter(layer: comet_ds.MoE) -> None:
    experts(layer)[1][0].weight = nn.Parameter(torch.ones(FFN, HIDDEN))


def remove_parameter(layer: comet_ds.MoE) -> None:
    for expert in experts(layer):
        del expert[3].bias
        expert[3].bias = None


def set_none(layer: comet_ds.MoE) -> None:
    experts(layer)[2][3].bias = None


def register(layer: comet_ds.MoE) -> None:
    experts(layer)[0][3].register_parameter("bias", nn.Parameter(torch.ones(HIDDEN)))


def make_a_buffer(layer: comet_ds.MoE) -> None:
    linear = experts(layer)[0][3]
    value = linear._parameters.pop("bias").detach().clone()
    linear.register_buffer("bias", value)


@pytest.mark.parametrize(
    "change", [replace_parameter, remove_parameter, set_none, register, make_a_buffer]
)
def test_replaced_parameters_unstack(change, monkeypatch: pytest.MonkeyPatch) -> None:
    said = []
    monkeypatch.setattr(logger, "log_dist_once", lambda message, **_: said.append(message))
    layer, unstacked = layers(sequential(HIDDEN, FFN))
    for made in (layer, unstacked):
        change(made)
    assert not is_stacked(layer) and layer.deepspeed_moe.experts.reason
    assert len(said) == 1 and "one parameter per expert from now on: " in said[0]
    assert_same(*(dict(made.named_parameters()) for made in (layer, unstacked)))
    assert all(p.group_name == "ep_size_1" for e in experts(layer)[3:] for p in e.parameters())
    assert_trains_alike(layer, unstacked)


def test_added_parameters_stay_beside_the_stacks() -> None:
    made = layers(sequential(HIDDEN, FFN))
    for layer in made:
        for expert in experts(layer):
            expert[3].scale = nn.Parameter(torch.full((HIDDEN,), 0.5))
            expert[3].register_forward_hook(lambda module, _, output: output * module.scale)
    assert is_stacked(made[0])
    assert list(made[0].state_dict()) == list(made[1].state_dict())
    assert_trains_alike(*made)
    copies = [copy.deepcopy(layer) for layer in made]
    for copied, layer in zip(copies, made, strict=True):
        names = [n for n, _ in layer.named_parameters()]
        assert [n for n, _ in copied.named_parameters()] == names
    assert_trains_alike(*copies)


def test_a_removed_module_keeps_its_values() -> None:
    """Whoever has taken it out may still use it."""
    layer = one().moe[0]
    linear, before = experts(layer)[1][0], values(experts(layer)[1][0])
    experts(layer)[1][0] = nn.Linear(HIDDEN, FFN)
    layer.deepspeed_moe.experts.unstack_if_replaced()
    assert not is_stacked(layer)
    assert_same(before, values(linear))
    assert type(linear.weight) is nn.Parameter


def test_unstacking_keeps_values_gradient_flags_and_tags() -> None:
    layer, unstacked = layers(sequential(HIDDEN, FFN))
    for made in (layer, unstacked):
        experts(made)[1][0].requires_grad_(False)
    layer.deepspeed_moe.configure(comet_ds.CometConfig(stack_experts=False))
    assert not stacks(layer) and not is_stacked(layer)
    for found, expected in zip(layer.parameters(), unstacked.parameters(), strict=True):
        assert type(found) is nn.Parameter and torch.equal(found, expected)
        assert found.requires_grad == expected.requires_grad
        assert vars(found) == vars(expected)
    assert_trains_alike(layer, unstacked)


# ---- PEFT ----------------------------------------------------------------------------------------

ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "DoRA": {"use_dora": True},
    "rank-stabilised": {"use_rslora": True, "lora_dropout": 0.0},
    "all biases": {"bias": "all"},
    "their biases": {"bias": "lora_only"},
    "a whole module": {"modules_to_save": ["dense_4h_to_h"], "target_modules": ["dense_h_to_4h"]},
    "by pattern": {"target_modules": r".*deepspeed_experts\.\d+\.dense.*"},
    "PiSSA": {"init_lora_weights": "pissa"},
}


class Wrapped(nn.Module):
    """What PEFT takes: a model."""

    def __init__(self, block: dict[str, Any]) -> None:
        super().__init__()
        self.layer = built(HandWrittenMLP(HIDDEN, FFN), comet_ds=block)

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)


@pytest.mark.parametrize("name", ADAPTERS)
def test_peft(name: str) -> None:
    peft = pytest.importorskip("peft")
    options = {"target_modules": ["dense_h_to_4h", "dense_4h_to_h"], "r": 4, **ADAPTERS[name]}
    made = []
    for block in ({}, UNSTACKED):
        torch.manual_seed(0)
        made.append(peft.get_peft_model(Wrapped(block), peft.LoraConfig(**options)))
    stacked = made[0].base_model.model.layer
    assert is_stacked(stacked)
    assert_same(*(values(model) for model in made))
    trained = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in made]
    assert trained[0] == trained[1] > 0
    stacked.deepspeed_moe.experts.unstack_if_replaced()
    assert is_stacked(stacked)
    for model in made:
        for param in model.parameters():
            if param.requires_grad and "lora" in name:
                nn.init.normal_(param, std=0.1)
    copied = copy.deepcopy(made[0])
    assert [n for n, _ in copied.named_parameters()] == [n for n, _ in made[0].named_parameters()]
    assert_trains_alike(*made)
    assert_trains_alike(copied, copy.deepcopy(copied))
    assert_same(values(copied), values(made[0]))
    assert_same(*(peft.get_peft_model_state_dict(model) for model in made))
    x = torch.randn(7, HIDDEN)
    with made[0].disable_adapter(), made[1].disable_adapter(), torch.no_grad():
        assert torch.equal(*(model.eval()(x)[0] for model in made))
    for model in made:
        model.merge_adapter()
    assert_same(*(values(model) for model in made))
    for model in made:
        model.unmerge_adapter()
    merged = [model.merge_and_unload() for model in made]
    assert_same(*(values(model) for model in merged))
    stacked.deepspeed_moe.experts.unstack_if_replaced()
    assert is_stacked(stacked) == (name != "a whole module")
    for model in merged:
        model.requires_grad_(True)
    assert_trains_alike(*merged)


def test_peft_on_one_expert() -> None:
    peft = pytest.importorskip("peft")
    made = []
    for block in ({}, UNSTACKED):
        torch.manual_seed(0)
        model = Wrapped(block)
        config = peft.LoraConfig(target_modules=r".*deepspeed_experts\.1\.dense.*", r=4)
        made.append(peft.get_peft_model(model, config))
    assert is_stacked(made[0].base_model.model.layer)
    assert_trains_alike(*made)
