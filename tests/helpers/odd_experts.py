# SPDX-License-Identifier: Apache-2.0
"""Experts of all kinds: those whose parameters are stacked, and those that keep their own."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.experts_zoo import GatedMLP, HandWrittenMLP, NormMLP, TiedMLP, TupleMLP, sequential
from helpers.training import FFN, HIDDEN


class Direct(nn.Module):
    """Parameters of its own, one without dimensions, one frozen, one that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(HIDDEN, FFN))
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.shift = nn.Parameter(torch.zeros(HIDDEN), requires_grad=False)
        self.register_parameter("nothing", None)
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norm(x) @ self.up) @ self.up.t()
        return hidden * self.scale + self.shift


class Lists(nn.Module):
    """Parameter containers of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.matrices = nn.ParameterList(torch.zeros(HIDDEN, HIDDEN) for _ in range(3))
        self.vectors = nn.ParameterDict({"a": torch.zeros(HIDDEN), "b": torch.ones(HIDDEN)})

    def forward(self, x: Tensor) -> Tensor:
        for matrix in self.matrices:
            x = torch.tanh(x @ matrix)
        return x * self.vectors["b"] + self.vectors.a


class Counting(nn.Module):
    """Buffers, as nn.BatchNorm has them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN)
        self.register_buffer("mean", torch.zeros(HIDDEN))
        self.register_buffer("calls", torch.tensor(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.training:
            self.calls += 1
            self.mean.lerp_(y.detach().reshape(-1, HIDDEN).mean(0), 0.1)
        return y - self.mean


class Nested(nn.Module):
    """Containers in containers, and a module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"first": sequential(HIDDEN, FFN), "second": GatedMLP(HIDDEN, FFN)})
            for _ in range(2)
        )
        self.again = self.blocks[1]["first"]

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block["second"](block["first"](x))
        return self.again(x)


class Attention(nn.Module):
    """A module of torch's with a fast path of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(HIDDEN, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(0, -3)
        return self.attention(y, y, y, need_weights=False)[0].view(x.shape)


class Clipped(nn.Linear):
    """Changes its weight in forward."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.clamp_(-0.1, 0.1)
        return super().forward(x)


class Empty(nn.Linear):
    """A parameter without elements."""

    def __init__(self) -> None:
        super().__init__(HIDDEN, HIDDEN)
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.void = nn.Parameter(torch.zeros(0))


def compiled() -> nn.Module:
    return torch.compile(sequential(HIDDEN, FFN), backend="eager")


def weight_normed() -> nn.Module:
    expert = HandWrittenMLP(HIDDEN, FFN)
    nn.utils.parametrizations.weight_norm(expert.dense_h_to_4h)
    return expert


def spectral_normed() -> nn.Module:
    expert = HandWrittenMLP(HIDDEN, FFN)
    nn.utils.parametrizations.spectral_norm(expert.dense_4h_to_h)
    return expert


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(HIDDEN, HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.reshape(-1, HIDDEN, 1)).view(x.shape)


class Recurrent(nn.Module):
    """Its nn.LSTM keeps a list of its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x.reshape(-1, HIDDEN))[0].view(x.shape)


class Aliased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(HIDDEN, HIDDEN))
        self.by_name = {"w": self.weight}

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.by_name["w"]


class Shared(nn.Linear):
    """All copies are one."""

    def __deepcopy__(self, memo: dict) -> Shared:
        return self


class Special(nn.Parameter):
    pass


def special() -> nn.Module:
    linear = nn.Linear(HIDDEN, HIDDEN)
    linear.weight = Special(linear.weight.data)
    return linear


STACKED: dict[str, Callable[[], nn.Module]] = {
    "with biases": lambda: sequential(HIDDEN, FFN),
    "without": lambda: sequential(HIDDEN, FFN, bias=False),
    "gated": lambda: GatedMLP(HIDDEN, FFN),
    "one Linear": lambda: nn.Linear(HIDDEN, HIDDEN),
    "tuple": lambda: TupleMLP(HIDDEN, FFN),
    "norm": lambda: NormMLP(HIDDEN, FFN),
    "tied": lambda: TiedMLP(HIDDEN),
    "direct": Direct,
    "lists": Lists,
    "buffers": Counting,
    "nested": Nested,
    "attention": Attention,
    "changes its weight": lambda: Clipped(HIDDEN, HIDDEN),
    "empty parameters": Empty,
    "compiled": compiled,
    "weight norm": weight_normed,
    "spectral norm": spectral_normed,
    "in bfloat16": lambda: sequential(HIDDEN, FFN).bfloat16(),
    "dropout": lambda: sequential(HIDDEN, FFN, dropout=0.3),
}

# And the reason that the log has.
PER_EXPERT = {
    "convolution": (Conv, "conv.weight has 3 dimensions"),
    "recurrent": (Recurrent, "lstm._flat_weights holds parameters as well"),
    "aliased": (Aliased, "Aliased.by_name holds parameters as well"),
    "shared": (lambda: Shared(HIDDEN, HIDDEN), "weight is the same parameter in several experts"),
    "special": (special, "weight is a Special"),
}
