# SPDX-License-Identifier: Apache-2.0
"""A small MoE model and its training through DeepSpeed's engine, with either layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from torch import Tensor, nn

import comet_ds
from helpers.experts_zoo import randomize, sequential

HIDDEN, FFN, NUM_EXPERTS = 16, 32, 4
CLASSES = {"deepspeed": DeepSpeedMoE, "comet_ds": comet_ds.MoE}


class Model(nn.Module):
    """Two MoE layers between linear ones; the loss adds their auxiliary losses.

    Args:
        expert: makes the expert of layer 0 or 1.
    """

    def __init__(
        self,
        cls: type[DeepSpeedMoE],
        *,
        checkpointing: bool = False,
        expert: Callable[[int], nn.Module] | None = None,
        **options: Any,
    ):
        super().__init__()
        self.first = nn.Linear(HIDDEN, HIDDEN)
        self.moe = nn.ModuleList(
            cls(
                HIDDEN,
                sequential(HIDDEN, FFN) if expert is None else expert(layer),
                num_experts=NUM_EXPERTS,
                **options,
            )
            for layer in range(2)
        )
        self.last = nn.Linear(HIDDEN, HIDDEN)
        self.checkpointing = checkpointing

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x, loss = self.first(x), 0.0
        for moe in self.moe:
            if self.checkpointing:
                y, l_aux, _ = torch.utils.checkpoint.checkpoint(moe, x, use_reentrant=False)
            else:
                y, l_aux, _ = moe(x)
            x, loss = x + y, loss + 0.01 * l_aux
        return nn.functional.mse_loss(self.last(x).float(), target.float()) + loss


def config(size: int, **overrides: Any) -> dict[str, Any]:
    """Return a DeepSpeed configuration; nested dicts replace whole blocks."""
    accumulation = overrides.get("gradient_accumulation_steps", 1)
    return {
        "train_batch_size": 2 * size * accumulation,
        "gradient_accumulation_steps": accumulation,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-2, "torch_adam": True}},
        "steps_per_print": 1000,
        **overrides,
    }


def batches(rank: int, count: int, dtype: torch.dtype = torch.float32, disturbance: int = 0):
    """Yield inputs and targets of a fixed function, different on every rank.

    Args:
        disturbance: 0, or which noise to add to the inputs: one rounding error of either sign.
    """
    generator = torch.Generator().manual_seed(1000 + rank)
    noise = torch.Generator().manual_seed(100 * disturbance + rank)
    teacher = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(1))
    for _ in range(count):
        x = torch.randn(2, 12, HIDDEN, generator=generator)
        target = torch.tanh(x @ teacher).to(dtype)
        x = x.to(dtype)
        if disturbance:
            signs = torch.randint(0, 2, x.shape, generator=noise) * 2 - 1
            x = x * (1 + torch.finfo(dtype).eps * signs).to(dtype)
        yield x, target


def build_engine(kind: str, settings: dict[str, Any], **options: Any):
    """Initialise an engine on the same weights whatever the layer's class."""
    torch.manual_seed(0)
    model = Model(CLASSES[kind], **options)
    return comet_ds.initialize(model=model, config=settings)[0]


def train(
    engine: Any, rank: int, steps: int, dtype: torch.dtype = torch.float32, disturbance: int = 0
) -> list[float]:
    """Train for some optimizer steps; return the loss of every micro-batch."""
    torch.manual_seed(5 + rank)
    losses = []
    count = steps * engine.gradient_accumulation_steps()
    for x, target in batches(rank, count, dtype, disturbance):
        loss = engine(x.to(engine.device), target.to(engine.device))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


BF16 = {"bf16": {"enabled": True}}
OFFLOAD = {
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "zero_force_ds_cpu_optimizer": False,
}


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **more}}


# ---- pipeline ----------------------------------------------------------------------------------


class PipeMoE(nn.Module):
    """A pipeline layer: one tensor in, one out.

    The experts start different: as copies, and without l_aux in the loss, the gate's gradient would
    be rounding noise, which Adam makes as large as any other.
    """

    def __init__(self, kind: str, rank: int) -> None:
        super().__init__()
        self.moe = CLASSES[kind](
            HIDDEN, sequential(HIDDEN, FFN), num_experts=NUM_EXPERTS, ep_size=2, k=2
        )
        for i, expert in enumerate(self.moe.deepspeed_moe.experts.deepspeed_experts):
            randomize(expert, seed=rank % 2 * self.moe.num_local_experts + i)

    def forward(self, x):
        return x + self.moe(x)[0]
