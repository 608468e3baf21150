# SPDX-License-Identifier: Apache-2.0
"""What users put in the place of gates and experts, and how the layer names it.

Half of these have nothing of DeepSpeed's classes but the call, half are subclasses of them.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import deepspeed.moe.experts
import deepspeed.moe.layer
import torch
from deepspeed.moe import sharded_moe
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from torch import Tensor, nn

from comet_ds import MoE
from comet_ds.gate.topk_gate import TopKGate
from helpers.parity import HIDDEN

NUM_EXPERTS = 8


class HashGate(nn.Module):
    """Routes by position; has nothing of DeepSpeed's gate, not even its attributes."""

    def __init__(self, num_experts: int = NUM_EXPERTS) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, num_experts))

    def _set_ep_group(self, ep_group: Any) -> None:
        """What DeepSpeed's layer calls."""

    def forward(self, x: Tensor, used_token: Any, sparse_routes: bool, use_tutel: bool) -> tuple:
        assert (sparse_routes, use_tutel) == (True, False)
        num_tokens, num_experts = x.shape[0], self.scale.numel()
        token = torch.arange(num_tokens)
        ids = torch.stack([token % num_experts, (token + 3) % num_experts, (token + 5) % 7])
        ids[1, ::4] = -1
        slots = nn.functional.one_hot(ids.clamp(min=0), num_experts).flatten(0, 1).cumsum(0) - 1
        slots = slots.view(*ids.shape, -1).gather(2, ids.clamp(min=0).unsqueeze(2)).squeeze(2)
        weights = self.scale[ids.clamp(min=0)] * torch.sigmoid(x.float().mean(1))
        counts = torch.bincount(ids[ids >= 0], minlength=num_experts)
        l_aux = self.scale.square().sum()
        capacity = torch.tensor(3 * num_tokens)
        return l_aux, capacity, num_experts, ids.int(), slots.int(), weights, counts


class SharperGate(sharded_moe.TopKGate):
    """A subclass that changes what it is given."""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> tuple:
        return super().forward(3 * input, *args, **kwargs)


class OurSharperGate(TopKGate):
    """The same of our gate."""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> tuple:
        return super().forward(3 * input, *args, **kwargs)


class Centering(deepspeed.moe.experts.Experts):
    """Looks at all experts' rows together, which no single expert can."""

    def forward(self, inputs: Tensor) -> Tensor:
        assert inputs.dim() == 4 and inputs.shape[1] == self.num_local_experts
        norms = inputs.square().sum((0, 2, 3), keepdim=True).sqrt()
        return super().forward(inputs) * (1 + norms / norms.sum())


class Wrapped(nn.Module):
    """Has the layer's experts inside."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.inner = experts
        self.gain = nn.Parameter(torch.full((HIDDEN,), 1.5))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.gain * self.inner(inputs)


def gate_arguments(layer: DeepSpeedMoE) -> tuple:
    gate = layer.deepspeed_moe.gate
    capacity = (gate.capacity_factor, gate.eval_capacity_factor, gate.min_capacity)
    return (HIDDEN, NUM_EXPERTS, gate.k, *capacity, gate.noisy_gate_policy, gate.drop_tokens)


def replace_gate(layer: DeepSpeedMoE) -> None:
    layer.deepspeed_moe.gate = HashGate()


def subclass_gate(layer: DeepSpeedMoE) -> None:
    cls = OurSharperGate if isinstance(layer, MoE) else SharperGate
    gate = cls(*gate_arguments(layer))
    gate.load_state_dict(layer.deepspeed_moe.gate.state_dict())
    layer.deepspeed_moe.gate = gate


def stock_gate(layer: DeepSpeedMoE) -> None:
    gate = sharded_moe.TopKGate(*gate_arguments(layer))
    gate.load_state_dict(layer.deepspeed_moe.gate.state_dict())
    layer.deepspeed_moe.gate = gate


def patch_gate(layer: DeepSpeedMoE) -> None:
    gate = layer.deepspeed_moe.gate

    def forward(self: nn.Module, input: Tensor, *args: Any) -> tuple:
        l_aux, *rest = type(self).forward(self, input, *args)
        return 2 * l_aux, *rest

    gate.forward = types.MethodType(forward, gate)


def change_by_hook(layer: DeepSpeedMoE) -> None:
    """Hooks may change what a module is given and what it returns."""
    moe = layer.deepspeed_moe
    moe.gate.register_forward_pre_hook(lambda _, args: (2 * args[0], *args[1:]))
    moe.gate.register_forward_hook(lambda _, args, out: (out[0] * 3, *out[1:5], out[5] / 2, out[6]))
    moe.experts.register_forward_hook(lambda _, args, out: out + args[0])
    moe.experts.deepspeed_experts[1].register_forward_hook(lambda _, args, out: 2 * out)


def subclass_experts(layer: DeepSpeedMoE) -> None:
    old = layer.deepspeed_moe.experts
    new = Centering(old.deepspeed_experts[0], layer.num_local_experts, layer.expert_group_name)
    new.deepspeed_experts.load_state_dict(old.deepspeed_experts.state_dict())
    layer.deepspeed_moe.experts = new


def wrap_experts(layer: DeepSpeedMoE) -> None:
    layer.deepspeed_moe.experts = Wrapped(layer.deepspeed_moe.experts)


def patch_experts(layer: DeepSpeedMoE) -> None:
    experts = layer.deepspeed_moe.experts
    experts.forward = types.MethodType(
        lambda self, inputs: type(self).forward(self, inputs.flip(1)).flip(1), experts
    )


def patch_one_expert(layer: DeepSpeedMoE) -> None:
    expert = layer.deepspeed_moe.experts.deepspeed_experts[0]
    expert.forward = types.MethodType(lambda self, x: -type(self).forward(self, x), expert)


OBJECTS: dict[str, tuple[Callable[[DeepSpeedMoE], None], str]] = {
    "replaced gate": (replace_gate, "the gate is a helpers.overrides.HashGate"),
    "subclass of the gate": (subclass_gate, "the gate is a helpers.overrides.OurSharperGate"),
    "DeepSpeed's gate": (stock_gate, "the gate is a deepspeed.moe.sharded_moe.TopKGate"),
    "patched gate": (patch_gate, "the forward of the gate, a TopKGate, is patched"),
    "hooks": (change_by_hook, "the gate has hooks"),
    "subclass of Experts": (subclass_experts, "Experts is a helpers.overrides.Centering"),
    "wrapped Experts": (wrap_experts, "Experts is a helpers.overrides.Wrapped"),
    "patched Experts": (patch_experts, "the forward of the experts' StackedExperts is patched"),
    "patched expert": (patch_one_expert, ""),
}
