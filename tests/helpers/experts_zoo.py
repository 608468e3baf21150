# SPDX-License-Identifier: Apache-2.0
"""Expert modules as users write them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GatedMLP(nn.Module):
    """Llama's MLP, by other attribute names."""

    def __init__(self, hidden: int, ffn: int, bias: bool = False) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden, ffn, bias=bias)
        self.w3 = nn.Linear(hidden, ffn, bias=bias)
        self.w2 = nn.Linear(ffn, hidden, bias=bias)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.act_fn(self.w1(x)) * self.w3(x))


class UpFirstMLP(GatedMLP):
    """The product the other way round, in functional style."""

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(torch.mul(self.w3(x), F.gelu(self.w1(x), approximate="tanh")))


class HandWrittenMLP(nn.Module):
    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(hidden, ffn)
        self.dense_4h_to_h = nn.Linear(ffn, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(self.dense_h_to_4h(x).relu())


class TupleMLP(HandWrittenMLP):
    """Megatron's convention: output and bias apart."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return super().forward(x), None


class TiedMLP(nn.Module):
    """Square matrices that are one parameter."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(hidden, hidden, False), nn.Linear(hidden, hidden, False)
        self.down.weight = self.up.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)))


class NormMLP(GatedMLP):
    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__(hidden, ffn)
        self.norm = nn.LayerNorm(hidden)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


class ClampedMLP(HandWrittenMLP):
    """Acts in place, on a value the product's data flow does not show."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dense_h_to_4h(x)
        hidden.clamp_(max=7)
        return self.dense_4h_to_h(F.relu(hidden))


class KeywordMLP(HandWrittenMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(input=F.relu(self.dense_h_to_4h(x)))


class DropoutInTraining(HandWrittenMLP):
    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.dense_h_to_4h(x))
        return self.dense_4h_to_h(F.dropout(hidden) if self.training else hidden)


def sequential(hidden: int, ffn: int, *, bias: bool = True, dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(
        nn.Linear(hidden, ffn, bias=bias),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(ffn, hidden, bias=bias),
    )


def randomize(module: nn.Module, seed: int) -> nn.Module:
    """Give all parameters values of their own (a layer's experts start as copies of one)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in module.parameters():
            scale = param.shape[-1] ** -0.5
            param.copy_(torch.randn(param.shape, generator=generator) * scale)
    return module
