# SPDX-License-Identifier: Apache-2.0
"""The layers that are timed: ours, DeepSpeed's MoE and its AutoEP, built with the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from deepspeed import comm as dist
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from torch import Tensor, nn

from comet_ds.bench.shapes import Shape
from comet_ds.gate.routing import Routing
from comet_ds.layer import MoE


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, ffn, bias=False)
        self.up_proj = nn.Linear(hidden, ffn, bias=False)
        self.down_proj = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


Layer = TypeVar("Layer", bound=DeepSpeedMoE)


def build(cls: type[Layer], shape: Shape, ep_size: int | None = None, **options: Any) -> Layer:
    """Build a layer whose weights differ between experts, but not between the classes.

    Args:
        cls: DeepSpeed's layer or ours.
        shape: the layer's sizes.
        ep_size: ranks the experts are spread over, all unless given.
        options: more arguments of ``cls``.
    """
    torch.manual_seed(0)
    with torch.device("cuda"):
        if shape.gated:
            expert: nn.Module = GatedMLP(shape.hidden, shape.ffn)
        else:
            up, down = nn.Linear(shape.hidden, shape.ffn), nn.Linear(shape.ffn, shape.hidden)
            expert = nn.Sequential(up, nn.GELU(), down)
        layer = cls(
            shape.hidden,
            expert,
            num_experts=shape.num_experts,
            ep_size=ep_size or dist.get_world_size(),
            k=shape.top_k,
            **options,
        )
    torch.manual_seed(1 + dist.get_rank())
    with torch.no_grad():
        for param in moe_of(layer).experts.deepspeed_experts.parameters():
            param.copy_(torch.randn_like(param) * param.shape[-1] ** -0.5)
    layer.to(torch.bfloat16).set_deepspeed_parallelism()
    return layer


def draw_tokens(shape: Shape, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Return this rank's input and the gradient of its output, [T, H] bf16 each."""
    torch.manual_seed(100 + dist.get_rank())
    x, grad = torch.randn(2, num_tokens, shape.hidden, device="cuda", dtype=torch.bfloat16)
    return x, grad


def moe_of(layer: Any) -> Any:
    """Return the MOELayer of a layer, DeepSpeed's or ours."""
    return layer.deepspeed_moe


def step(
    layer: nn.Module, x: Tensor, grad: Tensor, middle: Callable[[], Any] = lambda: None
) -> list[Tensor]:
    """Run forward, ``middle`` and backward; return the output and the input's gradient."""
    x = x.detach().requires_grad_()
    output, l_aux, _ = layer(x)
    middle()
    torch.autograd.backward([output, l_aux], [grad, torch.ones_like(l_aux)])
    assert x.grad is not None, "a layer's output depends on its input"
    return [output.detach(), x.grad]


def fix_routing(layer: MoE, router: nn.Linear | None = None) -> None:
    """Make a layer route as in its last forward, without its gate.

    Args:
        layer: has run once.
        router: ``gate.wg`` of another layer with the same ``top_k``. A gate with a copy of it runs,
            so that its time counts, and gives the routes their weights; the layer's own gate still
            says how many experts there are. None runs no gate.
    """
    moe = layer.deepspeed_moe
    found, timed = moe.routing, None
    if router is not None:
        timed = copy.deepcopy(moe.gate)
        timed.wg = copy.deepcopy(router)

    def route(x: Tensor, used_token: Tensor | None = None) -> Routing:
        if timed is not None:
            timed.zero_grad(set_to_none=True)
            made = timed.route(x, used_token)
            weights, l_aux, x = made.topk_weights, made.l_aux, made.tokens
        else:
            weights, l_aux = (t.clone().requires_grad_() for t in (found.topk_weights, found.l_aux))
        return found._replace(topk_weights=weights, l_aux=l_aux, tokens=x)

    moe.gate.route = route


def skew_routing(layer: MoE, others: Sequence[nn.Module], x: Tensor, std: float) -> None:
    """Give experts unequal loads, through gates that prefer some of them.

    The first element of every token becomes 1, and the gates' weights for it differ between
    experts. Collective.

    Args:
        layer: its routing is brought to ``std``, by changing its gate.
        others: other layers, also ``AutoEP``; their gates are changed in the same way.
        x: [T, H], this rank's tokens; changed.
        std: standard deviation of the experts' shares of all ranks' routes, before dropping.

    Raises:
        ValueError: no gate can reach ``std``.
    """
    weights = [gate_weight(layer) for layer in (layer, *others)]
    generator = torch.Generator().manual_seed(0)
    slopes = torch.randn(weights[0].shape[0], generator=generator).to(weights[0])
    x[:, 0] = 1

    @torch.no_grad()
    def std_with(strength: float) -> float:
        for weight in weights:
            weight[:, 0] = strength * slopes
        counts = layer.deepspeed_moe.gate.route(x).exp_counts.clone()
        dist.all_reduce(counts)
        return (counts / counts.sum()).std(unbiased=False).item()

    low, high = 0.0, 1.0
    while std_with(high) < std:
        high *= 2
        if high > 1e3:
            raise ValueError(f"shares of {len(slopes)} experts cannot have a deviation of {std}")
    for _ in range(16):
        middle = (low + high) / 2
        low, high = (middle, high) if std_with(middle) < std else (low, middle)


def gate_weight(layer: nn.Module) -> Tensor:
    """Return the weight of a layer's gate, [E, H]."""
    if isinstance(layer, AutoEP):
        return layer.layer.router.gate.weight
    return moe_of(layer).gate.wg.weight


class AutoEP(nn.Module):
    """DeepSpeed's AutoEP layer behind the interface of its MoE.

    It communicates by NCCL's all-to-all and computes by torch's grouped GEMM. It drops no route and
    computes no auxiliary loss.

    Args:
        shape: the layer's, with gated experts.

    Raises:
        ImportError: this DeepSpeed has no AutoEP.
    """

    def __init__(self, shape: Shape) -> None:
        from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
        from deepspeed.module_inject.auto_ep_presets.base import AutoEPConfig, MoELayerSpec

        super().__init__()
        assert shape.gated, "AutoEP has gated experts only"
        source = nn.Module()
        with torch.device("cuda"):
            source.gate = nn.Linear(shape.hidden, shape.num_experts, bias=False)
            experts = (GatedMLP(shape.hidden, shape.ffn) for _ in range(shape.num_experts))
            source.experts = nn.ModuleList(expert.to(torch.bfloat16) for expert in experts)
        spec = MoELayerSpec(
            moe_module_name="moe",
            model_family="qwen3_moe",
            router_name="gate",
            experts_name="experts",
            expert_storage="module_list",
            expert_w1_name="gate_proj",
            expert_w2_name="down_proj",
            expert_w3_name="up_proj",
            num_experts=shape.num_experts,
            top_k=shape.top_k,
            hidden_size=shape.hidden,
            ffn_hidden_size=shape.ffn,
            score_func="softmax",
            score_apply="post",
            route_norm=True,
            gate_bias=False,
            return_router_logits=False,
            router_logits_capture_target="none",
            router_logits_capture_index=None,
            router_logits_capture_layer_name=None,
            has_shared_experts=False,
            shared_experts_name="",
        )
        ep_size, rank = dist.get_world_size(), dist.get_rank()
        config = AutoEPConfig(enabled=True, autoep_size=ep_size)
        self.layer = AutoEPMoELayer(spec, source.to(torch.bfloat16), ep_size, rank, config)
        self.layer.to("cuda", torch.bfloat16).set_deepspeed_parallelism()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the output [T, H], an auxiliary loss of zero, and no counts."""
        output = self.layer(x[None])[0]
        return output, output.new_zeros(()).requires_grad_(), None
