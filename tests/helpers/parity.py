# SPDX-License-Identifier: Apache-2.0
"""Building DeepSpeed's layer and ours alike, running both, and an fp64 oracle for either."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.moe.experts import Experts
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from torch import Tensor, nn

from comet_ds.reference import reference_moe
from helpers.experts_zoo import randomize, sequential

HIDDEN, FFN = 16, 24
VARIANTS = {
    "reference": {"path": "reference"},
    "1 chunk": {"num_chunks": 1},
    "2 chunks": {"num_chunks": 2},
    "3 chunks": {"num_chunks": 3},
}


def tokens(
    rank: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Return a rank's input and output gradient."""
    torch.manual_seed(100 + rank)
    return torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)


def build(
    cls: type[DeepSpeedMoE],
    rank: int,
    *,
    expert: nn.Module | None = None,
    num_experts: int = 8,
    ep_size: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    parallel: bool = False,
    **options: Any,
) -> DeepSpeedMoE:
    """Build a layer; expert weights depend on the global expert alone, whatever ep_size is."""
    torch.manual_seed(0)
    expert = sequential(HIDDEN, FFN) if expert is None else expert
    hidden = next(iter(expert.parameters())).shape[-1]
    layer = cls(hidden, expert, num_experts=num_experts, ep_size=ep_size, **options)
    local = layer.num_local_experts
    for i, module in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
        randomize(module, seed=rank % ep_size * local + i)
    layer = layer.to(device, dtype)
    if parallel:
        layer.set_deepspeed_parallelism()
    return layer


def run(
    layer: DeepSpeedMoE, x: Tensor, grad: Tensor, used_token: Tensor | None = None
) -> dict[str, Tensor]:
    """Run forward and backward from a fixed seed; return everything that comes out."""
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(7)
    output, l_aux, exp_counts = layer(x, used_token)
    layer.zero_grad()
    torch.autograd.backward([output, l_aux], [grad, torch.ones_like(l_aux)])
    grads = named_grads(layer)
    assert None not in grads.values(), [n for n, g in grads.items() if g is None]
    result = {"output": output, "l_aux": l_aux, "exp_counts": exp_counts, "grad of x": x.grad}
    return {name: t.detach() for name, t in (result | grads).items()}


def named_grads(layer: DeepSpeedMoE) -> dict[str, Tensor | None]:
    """Return "grad of <name>", by the names that parameters have in a ``state_dict()``."""
    experts = next(m for m in layer.deepspeed_moe.experts.modules() if isinstance(m, Experts))
    inside, prefix = {id(p) for p in experts.parameters()}, "deepspeed_moe.experts"
    named = {n: p for n, p in layer.named_parameters() if id(p) not in inside}
    experts = experts.deepspeed_experts
    named |= {f"{prefix}.deepspeed_experts.{n}": p for n, p in experts.named_parameters()}
    return {f"grad of {name}": param.grad for name, param in named.items()}


def oracle(layer: Any, x: Tensor, grad: Tensor, experts: list[nn.Module]) -> dict[str, Tensor]:
    """Compute output and gradients in fp64 for the routing our layer decided last.

    Args:
        layer: a comet_ds.MoE that has just run on x, without dropping.
        experts: all experts, in fp64.
    """
    ids = layer.deepspeed_moe.routing.topk_ids
    weight = layer.deepspeed_moe.gate.wg.weight.detach().double().requires_grad_()
    x = x.detach().double().requires_grad_()
    kept = ids >= 0
    flat = x.reshape(-1, x.shape[-1])
    probs = torch.softmax(flat @ weight.t(), dim=1)
    weights = probs.gather(1, ids.clamp(min=0)) * kept
    if ids.shape[1] > 1:
        weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-300)
    output, _ = reference_moe(flat, ids, weights, experts)
    # l_aux counts first choices for k = 2, all routes for other k.
    num_tokens, k = max(flat.shape[0], 1), ids.shape[1]
    counted = ids[:, :1] if k == 2 else ids
    share = torch.bincount(counted.flatten(), minlength=probs.shape[1]) / num_tokens
    l_aux = (probs.sum(dim=0) / num_tokens * share).sum() * probs.shape[1] / counted.shape[1]
    params = [p for e in experts for p in e.parameters()]
    loss = (output * grad.double().view_as(output)).sum() + l_aux
    grads = torch.autograd.grad(loss, [x, weight, *params], allow_unused=True)
    return {
        "output": output.detach().view_as(x),
        "l_aux": l_aux.detach(),
        "grad of x": grads[0],
        "grad of gate": grads[1],
        "grads of experts": [
            torch.zeros_like(p) if g is None else g for p, g in zip(params, grads[2:], strict=True)
        ],
    }
