# SPDX-License-Identifier: Apache-2.0
"""torch.jit.trace and torch.export of a single-rank layer: exact, or an error that says why."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from helpers.parity import HIDDEN, build
from helpers.tolerance import assert_close
from torch import Tensor, nn

from comet_ds import MoE

Made = Callable[..., tuple[Tensor, Tensor, Tensor]]
NUM_TOKENS = 24
CASES = list(itertools.product((1, 2, 4), (True, False), (True, False)))
IDS = [f"k={k}, {'drop' if d else 'dropless'}, {'stacked' if s else 'one'}" for k, d, s in CASES]


def make(k: int, drop: bool, stack: bool, **options) -> MoE:
    block = {"stack_experts": stack}
    return build(MoE, 0, k=k, drop_tokens=drop, capacity_factor=0.6, comet_ds=block, **options)


def trace(layer: nn.Module, x: Tensor) -> Made:
    return torch.jit.trace(layer, (x,), check_trace=False)


def export(layer: nn.Module, x: Tensor, **options) -> Made:
    return torch.export.export(layer, (x,), strict=False, **options).module()


def assert_alike(layer: MoE, made: Made, shape: tuple[int, ...]) -> None:
    x, results = torch.randn(shape), []
    for function in (layer, made):
        torch.manual_seed(3)
        results.append(function(x))
    for got, expected, name in zip(*reversed(results), ("output", "l_aux", "counts"), strict=True):
        assert_close(got.detach(), expected.detach(), f"{shape}: {name}")


@pytest.mark.parametrize("how", [trace, export])
@pytest.mark.parametrize(("k", "drop", "stack"), CASES, ids=IDS)
def test_exact(how: Callable[..., Made], k: int, drop: bool, stack: bool) -> None:
    """For other values than it was made from, which are routed otherwise."""
    layer = make(k, drop, stack).eval()
    made = how(layer, torch.randn(2, NUM_TOKENS // 2, HIDDEN))
    for _ in range(3):
        assert_alike(layer, made, (2, NUM_TOKENS // 2, HIDDEN))
    assert layer(torch.randn(5, HIDDEN))[1].requires_grad  # the layer is what it was


@pytest.mark.parametrize(("k", "drop", "stack"), CASES, ids=IDS)
def test_other_numbers_of_tokens(k: int, drop: bool, stack: bool) -> None:
    """Without dropping any will do; the capacity is of one number, so others are refused."""
    layer = make(k, drop, stack).eval()
    x = torch.randn(NUM_TOKENS, HIDDEN)
    traced = trace(layer, x)
    dynamic = {"dynamic_shapes": ({0: torch.export.Dim("tokens", min=2, max=4096)},)}
    if not drop:
        for made, num_tokens in itertools.product((traced, export(layer, x, **dynamic)), (3, 57)):
            assert_alike(layer, made, (num_tokens, HIDDEN))
        return
    with pytest.raises(RuntimeError, match=r"shape '\[24, 16\]' is invalid for input of size 912"):
        traced(torch.randn(57, HIDDEN))
    with pytest.raises(Exception, match=r"[Yy]ou marked tokens as dynamic"):
        export(layer, x, **dynamic)


def test_in_a_model_with_a_residual() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.moe = make(2, True, True, use_residual=True)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.moe(x)[0]

    model = Model().eval()
    for how in (trace, export):
        made = how(model, torch.randn(NUM_TOKENS, HIDDEN))
        x, results = torch.randn(NUM_TOKENS, HIDDEN), []
        for function in (model, made):
            torch.manual_seed(3)
            results.append(function(x))
        assert_close(results[1].detach(), results[0].detach(), "output")


@pytest.mark.parametrize("how", [trace, export])
def test_what_cannot_be_recorded_says_so(how: Callable[..., Made]) -> None:
    x = torch.randn(NUM_TOKENS, HIDDEN)
    with pytest.raises(RuntimeError, match=r"ep_size 2 cannot be traced or exported.*ep_size 1"):
        how(build(MoE, 0, ep_size=2), x)
    layer = make(2, True, True)
    layer.deepspeed_moe.gate.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="cannot be traced or exported: the gate has hooks"):
        how(layer, x)


def test_strict_export_names_the_other() -> None:
    with pytest.raises(Exception, match=r"comet_ds\.MoE is exported with .*strict=False"):
        torch.export.export(make(2, True, True), (torch.randn(8, HIDDEN),), strict=True)
