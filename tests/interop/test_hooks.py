# SPDX-License-Identifier: Apache-2.0
"""Hooks on the layer's modules fire where they are, see what DeepSpeed's modules see, and change
nothing of the results by being there."""

from __future__ import annotations

import pytest
import torch
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from helpers.parity import HIDDEN, VARIANTS, build, run, tokens
from helpers.tolerance import assert_close
from torch import nn

from comet_ds import MoE

HOOKED = {
    "gate": lambda moe: moe.gate,
    "experts": lambda moe: moe.experts,
    "expert": lambda moe: moe.experts.deepspeed_experts[0],
    "layer": lambda moe: moe,
}


def check_hooks(rank: int, size: int, variant: str, drop: bool, where: range) -> dict[str, int]:
    """Only some ranks have hooks; the others' results stay what they were."""
    layer = build(
        MoE,
        rank,
        ep_size=size,
        k=2,
        drop_tokens=drop,
        parallel=size > 1,
        comet_ds=VARIANTS[variant],
    )
    x, grad = tokens(rank, (3, HIDDEN))  # fewer than min_capacity, which DeepSpeed's k = 1 refuses
    expected, calls = run(layer, x, grad), dict.fromkeys(HOOKED, 0)
    inputs = {}
    if rank in where:
        for name, find in HOOKED.items():
            module = find(layer.deepspeed_moe)

            def count(module, args, *_, name=name):
                calls[name] += 1
                inputs[name] = args[0]

            module.register_forward_pre_hook(count)
            module.register_forward_hook(count)
            module.register_full_backward_hook(lambda *_, name=name: count(_[0], [None], name=name))
    got = run(layer, x, grad)
    for name, value in expected.items():
        assert_close(got[name], value, f"rank {rank}, {variant}: {name}")
    return calls


@pytest.mark.parametrize("drop", [True, False], ids=["dropping", "dropless"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [1, 2])
def test_hooks_fire_where_they_are(world, size: int, variant: str, drop: bool) -> None:
    if size == 1:
        results = [check_hooks(0, 1, variant, drop, range(1))]
    else:
        results = world(size).run(check_hooks, variant, drop, range(1))
    assert set(results[0].values()) == {3}, results
    assert all(set(r.values()) == {0} for r in results[1:])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_hook_on_the_gate_changes_nothing(k: int, variant: str) -> None:
    """Not even for fewer tokens than DeepSpeed's gate takes, or none."""
    layer = build(MoE, 0, k=k, comet_ds=VARIANTS[variant])
    for num_tokens in (0, 1, 33):
        x, grad = tokens(0, (num_tokens, HIDDEN))
        expected = run(layer, x, grad)
        handle = layer.deepspeed_moe.gate.register_forward_hook(lambda *_: None)
        got = run(layer, x, grad)
        handle.remove()
        for name, value in expected.items():
            assert torch.equal(got[name], value), name


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("drop", [True, False], ids=["dropping", "dropless"])
def test_a_hook_sees_what_deepspeeds_gate_returns(k: int, drop: bool) -> None:
    seen = []
    x = torch.randn(40, HIDDEN)
    for cls in (DeepSpeedMoE, MoE):
        layer = build(cls, 0, k=k, drop_tokens=drop, capacity_factor=0.6)
        layer.deepspeed_moe.gate.register_forward_hook(lambda _, args, out: seen.append(out))
        torch.manual_seed(2)
        layer(x)
    theirs, ours = seen
    for index, name in enumerate(("l_aux", "capacity", "experts", "indices", "slots", "gates")):
        kept = theirs[3] >= 0
        expected, got = (torch.as_tensor(answer[index]) for answer in seen)
        if name == "slots":
            expected, got = expected[kept], got[kept]
        assert expected.dtype == got.dtype and torch.equal(expected, got), name
    assert torch.equal(theirs[6], ours[6])


def test_hooks_on_all_modules_fire() -> None:
    called = []
    layer = build(MoE, 0, k=2)
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: called.append(module)
    )
    try:
        layer(torch.randn(16, HIDDEN))
    finally:
        handle.remove()
    moe = layer.deepspeed_moe
    for module in (layer, moe, moe.gate, moe.experts, *moe.experts.deepspeed_experts.modules()):
        if not isinstance(module, nn.ModuleList):
            assert any(module is m for m in called), module
