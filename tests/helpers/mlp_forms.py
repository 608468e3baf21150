# SPDX-License-Identifier: Apache-2.0
"""The MLPs that the fused path takes, by form."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from helpers.experts_zoo import GatedMLP, HandWrittenMLP, UpFirstMLP

BF16, FP16 = torch.bfloat16, torch.float16


class ExactGeGLU(GatedMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.gelu(self.w1(x)) * self.w3(x))


def two_matrices(activation: nn.Module, bias: bool) -> Callable[[int, int], nn.Module]:
    return lambda hidden, ffn: nn.Sequential(
        nn.Linear(hidden, ffn, bias=bias), activation, nn.Linear(ffn, hidden, bias=bias)
    )


FORMS: dict[str, Callable[[int, int], nn.Module]] = {
    "gelu with biases": two_matrices(nn.GELU(), True),
    "gelu": two_matrices(nn.GELU(), False),
    "gelu_tanh with biases": two_matrices(nn.GELU(approximate="tanh"), True),
    "relu with biases": HandWrittenMLP,
    "silu": two_matrices(nn.SiLU(), False),
    "swiglu": GatedMLP,
    "swiglu with biases": lambda hidden, ffn: GatedMLP(hidden, ffn, bias=True),
    "geglu tanh": UpFirstMLP,
    "geglu": ExactGeGLU,
}
