# SPDX-License-Identifier: Apache-2.0
"""Parts that are replaced before or after construction: what fits runs, what does not is named.

Classes put into DeepSpeed's module, another MOELayer, gates and experts that answer what nobody can
use, and a gate on one rank only.
"""

from __future__ import annotations

import deepspeed.moe.experts
import deepspeed.moe.layer
import pytest
import torch
from deepspeed.moe import sharded_moe
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from helpers.overrides import Centering, SharperGate, replace_gate
from helpers.parity import HIDDEN, VARIANTS, build, run, tokens
from helpers.tolerance import assert_close

from comet_ds import MoE


def test_classes_put_into_deepspeeds_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the layer is built; DeepSpeed's class then builds them too."""
    monkeypatch.setattr(deepspeed.moe.layer, "TopKGate", SharperGate)
    monkeypatch.setattr(deepspeed.moe.layer, "Experts", Centering)
    layers = [build(cls, 0, k=2) for cls in (DeepSpeedMoE, MoE)]
    x, grad = tokens(0, (48, HIDDEN))
    expected, got = (run(layer, x, grad) for layer in layers)
    assert type(layers[1].deepspeed_moe.gate) is SharperGate
    assert type(layers[1].deepspeed_moe.experts) is Centering
    for name, value in expected.items():
        assert_close(got[name], value, name)


def test_another_moelayer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Layer(sharded_moe.MOELayer):
        pass

    monkeypatch.setattr(deepspeed.moe.layer, "MOELayer", Layer)
    with pytest.raises(ValueError, match=r"MOELayer must be DeepSpeed's, got .*Layer"):
        build(MoE, 0)


def check_replaced_moelayer(rank: int, size: int) -> None:
    """Put in afterwards, it runs: DeepSpeed's, with our gate and experts."""
    x, grad = tokens(rank, (48, HIDDEN))
    expected = run(build(DeepSpeedMoE, rank, ep_size=size, k=2, parallel=True), x, grad)
    layer = build(MoE, rank, ep_size=size, k=2)
    own = layer.deepspeed_moe
    sizes = (layer.expert_group_name, size, layer.num_local_experts)
    layer.deepspeed_moe = sharded_moe.MOELayer(own.gate, own.experts, *sizes)
    layer.set_deepspeed_parallelism()
    got = run(layer, x, grad)
    for name, value in expected.items():
        assert_close(got[name], value, name)


def test_replaced_moelayer_runs(world) -> None:
    world(2).run(check_replaced_moelayer)


WRONG = {
    "4 values": (lambda out: out[:4], "DeepSpeed's 7 values .* got 4 values"),
    "no tuple": (lambda out: out[5], "DeepSpeed's 7 values .* got a Tensor"),
    "token-major": (lambda out: (*out[:3], out[3].t(), *out[4:]), r"\[routes, 24\], got \[24, 3\]"),
    "other experts": (lambda out: (*out[:2], 4, *out[3:]), "layer's 8 experts, got 4"),
    "bad index": (lambda out: (*out[:3], out[3] + 2, *out[4:]), "indices below 8, got 9"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_answers_of_a_gate(name: str) -> None:
    change, message = WRONG[name]
    layer = build(MoE, 0)
    replace_gate(layer)
    layer.deepspeed_moe.gate.register_forward_hook(lambda _, args, out: change(out))
    with pytest.raises(ValueError, match=f"the gate, a HashGate, must .*{message}"):
        layer(torch.randn(24, HIDDEN))


@pytest.mark.parametrize("variant", VARIANTS)
def test_wrong_answer_of_experts(variant: str) -> None:
    layer = build(MoE, 0, comet_ds=VARIANTS[variant])
    layer.deepspeed_moe.experts.register_forward_hook(lambda _, args, out: out[..., :3])
    with pytest.raises(ValueError, match=r"Experts must return the shape .* from StackedExperts"):
        layer(torch.randn(24, HIDDEN))


def test_a_gate_without_a_tensor_loss() -> None:
    layer = build(MoE, 0)
    replace_gate(layer)
    layer.deepspeed_moe.gate.register_forward_hook(lambda _, args, out: (0.0, *out[1:]))
    output, l_aux, counts = layer(torch.randn(24, HIDDEN))
    assert l_aux == 0.0 and counts.sum() == 66 and output.isfinite().all()


def check_disagreement(rank: int, size: int) -> str:
    layer = build(MoE, rank, ep_size=size)
    if rank == 1:
        replace_gate(layer)
    with pytest.raises(ValueError) as error:
        layer.set_deepspeed_parallelism()
    return str(error.value)


def test_a_gate_on_one_rank_only_is_refused(world) -> None:
    for message in world(2).run(check_disagreement):
        assert "HashGate on rank 1" in message
