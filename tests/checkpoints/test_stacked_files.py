# SPDX-License-Identifier: Apache-2.0
"""Stacked experts in files: sizes, what is loaded and what is wrong with it."""

from __future__ import annotations

import copy
import io
import itertools
from typing import Any

import pytest
import torch
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from helpers.experts_zoo import sequential
from helpers.layouts import (
    COPIES,
    MARGIN_BYTES,
    assert_same,
    assert_trains_alike,
    both,
    experts,
    file_size,
    one,
    reloaded,
    stacks,
    values,
)
from helpers.training import FFN, HIDDEN, Model
from torch import nn

import comet_ds

# ---- files ---------------------------------------------------------------------------------------


def test_file_sizes() -> None:
    """A view would take its whole stack into the file."""
    large = sequential(256, 512)
    made = [
        comet_ds.MoE(256, large, 8, comet_ds={"stack_experts": is_stacked})
        for is_stacked in (True, False)
    ]
    for part in (
        lambda layer: layer,
        lambda layer: layer.state_dict(),
        lambda layer: layer.state_dict(keep_vars=True),
        lambda layer: experts(layer)[1],
        lambda layer: experts(layer)[1].state_dict(),
        lambda layer: experts(layer)[1][0].weight,
        lambda layer: experts(layer)[1][0].weight.data,
        lambda layer: dict(experts(layer)[1].named_parameters()),
    ):
        sizes = [file_size(part(layer)) for layer in made]
        assert abs(sizes[0] - sizes[1]) < MARGIN_BYTES, sizes


def test_state_dict_file_is_plain() -> None:
    stacked, unstacked = both()
    for part in (lambda m: m, lambda m: experts(m.moe[0])[1]):
        file = io.BytesIO()
        torch.save(part(stacked).state_dict(), file)
        file.seek(0)
        assert_same(dict(torch.load(file, weights_only=True)), dict(part(unstacked).state_dict()))


def test_layer_file_keeps_hooks_off_the_layer() -> None:
    """The copy's methods are its own."""
    layer = one().moe[0]
    made = reloaded(layer)
    experts(made)[0].requires_grad_(False)
    assert experts(layer)[0][0].weight.requires_grad
    assert {id(m) for m in made.modules()}.isdisjoint(id(m) for m in layer.modules())


@pytest.mark.gpu(1)
def test_copies_on_a_gpu() -> None:
    """Rows with a storage of their own are made of a stack there as well."""
    models = [model.cuda() for model in both()]
    assert_same(*(values(model) for model in models))
    for copied in COPIES.values():
        assert_same(values(copied(models[0])), values(models[1]))
        assert_same(*(values(copied(experts(model.moe[1])[2])) for model in models))
    for model in models:
        torch.manual_seed(0)
        for value in model.state_dict().values():
            value.normal_()
        experts(model.moe[0])[1][0].weight.data.mul_(2)
    assert_same(*(values(model) for model in models))
    row = experts(models[0].moe[0])[1][0].weight
    assert row.detach().untyped_storage().nbytes() == row.nbytes
    assert row.detach().data_ptr() == row.data_ptr()
    sizes = [file_size(experts(model.moe[0])[1].state_dict()) for model in models]
    assert abs(sizes[0] - sizes[1]) < MARGIN_BYTES
    assert_same(*(values(model.cpu().bfloat16()) for model in models))


# ---- loading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_assigning", [False, True])
@pytest.mark.parametrize("on_meta", [False, True])
def test_loading(is_assigning: bool, on_meta: bool) -> None:
    source = both()
    for model in source:
        model.apply(lambda m: m.reset_parameters() if isinstance(m, nn.Linear) else None)
        torch.manual_seed(3)
    for source_model, is_stacked in itertools.product(source, (True, False)):
        with torch.device("meta" if on_meta else "cpu"):
            model = Model(comet_ds.MoE, comet_ds={"stack_experts": is_stacked})
        if on_meta and not is_assigning:
            model.to_empty(device="cpu")
        model.moe[0].requires_grad_(False)
        result = model.load_state_dict(source_model.state_dict(), assign=is_assigning)
        assert result.missing_keys == result.unexpected_keys == []
        assert_same(values(model), values(source_model))
        for name, param in model.named_parameters():
            assert param.requires_grad == (not name.startswith("moe.0")), name
            assert not is_stacked or "experts" not in name or param.group_name == "ep_size_1"
        assert_trains_alike(model, copy.deepcopy(model), steps=1)


def test_empty_weights_of_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    with accelerate.init_empty_weights():
        model = Model(comet_ds.MoE)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert stacks(model.moe[0])["0.weight"].group_name == "ep_size_1"
    model.load_state_dict(values(one()), assign=True)
    assert_trains_alike(model, one())


def test_loading_another_dtype_by_assignment() -> None:
    for model in both():
        state = {n: v.bfloat16() for n, v in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
        assert_same(values(model), state)


def test_loading_part_by_assignment() -> None:
    """As from several files."""
    model, state = one(), {n: v.bfloat16() for n, v in values(one()).items()}
    of_one = {n: v + 1 for n, v in state.items() if "deepspeed_experts.2" in n}
    model.load_state_dict(of_one, strict=False, assign=True)
    found = values(model)
    for name in state:
        if "experts" in name:
            assert torch.equal(found[name], of_one.get(name, state[name])), name


def test_assigned_weights_of_a_stacked_model_are_parameters() -> None:
    stacked, unstacked = both()
    unstacked.load_state_dict(stacked.state_dict(), assign=True)
    assert {type(p) for p in unstacked.parameters()} == {nn.Parameter}
    assert type(nn.Parameter(experts(stacked.moe[0])[0][0].weight.detach())) is nn.Parameter


def messages(model: Model, state: dict[str, Any], **options: Any) -> str:
    try:
        return str(model.load_state_dict(state, **options))
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize("is_strict", [True, False])
def test_loading_says_what_is_wrong(is_strict: bool) -> None:
    expert = "moe.0.deepspeed_moe.experts.deepspeed_experts.2"
    base = values(one())
    without = {n: v for n, v in base.items() if not n.startswith(f"{expert}.0")}
    for state in (
        base,
        without,
        {},
        {**base, f"{expert}.0.nonsense": torch.ones(1)},
        {**base, "moe.0.deepspeed_moe.experts.deepspeed_experts.9.0.bias": torch.ones(1)},
        {**base, f"{expert}.0.bias": torch.ones(3)},
        {**base, f"{expert}.0.bias": "text"},
    ):
        models = both()
        found, expected = (messages(m, state, strict=is_strict) for m in models)
        assert found == expected
        assert_same(*(values(m) for m in models))


def test_loading_one_expert() -> None:
    models = both()
    state = sequential(HIDDEN, FFN).state_dict()
    for model in models:
        experts(model.moe[0])[1].load_state_dict(state)
        experts(model.moe[0])[2][0].load_state_dict(
            {k: state[f"0.{k}"] for k in ("weight", "bias")}
        )
    assert_same(*(values(model) for model in models))
    assert torch.equal(experts(models[0].moe[0])[1][3].weight, state["3.weight"])


def test_loading_what_named_parameters_gave() -> None:
    """People save what they train in this way."""
    source, unstacked = both()
    state = {name: p.detach().clone() for name, p in source.named_parameters()}
    model = Model(comet_ds.MoE)
    missing = model.load_state_dict(state, strict=False)
    assert all("deepspeed_experts." in name for name in missing.missing_keys)
    assert not missing.unexpected_keys
    assert_same(values(model), values(source))
    state = {name: p.detach().clone() for name, p in unstacked.named_parameters()}
    model = Model(comet_ds.MoE)
    model.load_state_dict(state)
    assert_same(values(model), values(source))


def test_loading_into_deepspeeds_layer() -> None:
    stacked, _ = both()
    theirs = Model(DeepSpeedMoE)
    theirs.load_state_dict(stacked.state_dict())
    assert_same(values(theirs), values(stacked))
    ours = Model(comet_ds.MoE)
    ours.load_state_dict(theirs.state_dict())
    assert_same(values(ours), values(stacked))
