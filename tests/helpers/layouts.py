# SPDX-License-Identifier: Apache-2.0
"""The same model with stacked experts and with one parameter per expert."""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import comet_ds
from helpers.experts_zoo import randomize
from helpers.training import HIDDEN, Model

torch.set_num_threads(1)  # the tensors are tiny

UNSTACKED = {"stack_experts": False}
LAYOUTS = {"stacked": {}, "unstacked": UNSTACKED}
MARGIN_BYTES = 8192  # of files, for names; whatever the size of the experts


def both(**options: Any) -> tuple[Model, Model]:
    """Return a model in both layouts, experts with weights of their own."""
    return tuple(one(**options, comet_ds=block) for block in LAYOUTS.values())


def one(**options: Any) -> Model:
    """Return a model; its weights do not depend on the options."""
    torch.manual_seed(0)
    model = Model(comet_ds.MoE, **options)
    for number, layer in enumerate(model.moe):
        for index, expert in enumerate(experts(layer)):
            randomize(expert, seed=10 * number + index)
    return model


def layers(expert: nn.Module, num_experts: int = 4, **options: Any) -> tuple[Any, Any]:
    """Return a layer of some experts in both layouts; experts with weights of their own."""
    made = []
    for block in LAYOUTS.values():
        torch.manual_seed(0)
        layer = comet_ds.MoE(HIDDEN, expert, num_experts, comet_ds=block, **options)
        for index, module in enumerate(experts(layer)):
            randomize(module, seed=index)
        made.append(layer)
    return tuple(made)


def built(expert: nn.Module, num_experts: int = 3, **options: Any) -> comet_ds.MoE:
    """Return a layer whose experts differ; draws as many numbers in both layouts."""
    torch.manual_seed(0)
    layer = comet_ds.MoE(HIDDEN, expert, num_experts, **options)
    with torch.no_grad():
        for module in experts(layer):
            for param in module.parameters():
                param += 0.2 * torch.randn(param.shape)
    return layer.to(next(expert.parameters()).dtype)


def is_stacked(layer: comet_ds.MoE) -> bool:
    return layer.deepspeed_moe.experts.is_stacked


def experts(layer: Any) -> nn.ModuleList:
    return layer.deepspeed_moe.experts.deepspeed_experts


def stacks(layer: Any) -> dict[str, nn.Parameter]:
    """Return a layer's stacks by key; {} where there are none."""
    return layer.deepspeed_moe.experts.stacks()


def run(module: nn.Module, seed: int = 3) -> Tensor:
    """Run forward and backward of a model or a layer; return the loss."""
    torch.manual_seed(seed)
    dtype = next(module.parameters()).dtype
    x, target = torch.randn(2, 12, HIDDEN).to(dtype), torch.randn(2, 12, HIDDEN).to(dtype)
    if isinstance(module, Model):
        loss = module(x, target)
    else:
        output, l_aux, _ = module(x)
        loss = nn.functional.mse_loss(output.float(), target.float()) + l_aux
    loss.backward()
    return loss.detach()


def values(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of what ``state_dict()`` has."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def grads(module: nn.Module) -> dict[str, Tensor | None]:
    """Return copies of the gradients by the names of ``state_dict()``."""
    found = module.state_dict(keep_vars=True)
    found = {n: p.grad for n, p in found.items() if isinstance(p, nn.Parameter)}
    return {name: None if grad is None else grad.clone() for name, grad in found.items()}


def assert_same(*found: dict[str, Any]) -> None:
    """Assert that dictionaries have equal keys in the same order, and tensors equal to the bit."""
    first, second = found
    assert list(first) == list(second), set(first) ^ set(second)
    for name, value in first.items():
        other = second[name]
        if torch.is_tensor(value) and torch.is_tensor(other):
            facts = [(type(v), v.dtype, v.shape, v.device) for v in (value, other)]
            assert facts[0] == facts[1], (name, facts)
            assert torch.equal(value, other), f"{name}: {(value - other).abs().max()}"
        else:
            assert value is other is None or value == other, (name, value, other)


def assert_trains_alike(*modules: nn.Module, steps: int = 3) -> None:
    """Assert that two modules have the same losses, gradients and weights, to the bit."""
    optimizers = [torch.optim.AdamW(trained(m), lr=1e-2) for m in modules]
    for step in range(steps):
        losses = [run(module, seed=step) for module in modules]
        assert torch.equal(*losses), (step, losses)
        assert_same(*(grads(module) for module in modules))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_same(*(values(module) for module in modules))


def trained(module: nn.Module) -> Sequence[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def reloaded(what: Any) -> Any:
    file = io.BytesIO()
    torch.save(what, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def file_size(what: Any) -> int:
    file = io.BytesIO()
    torch.save(what, file)
    return file.tell()


COPIES = {"deepcopy": copy.deepcopy, "file": reloaded}
