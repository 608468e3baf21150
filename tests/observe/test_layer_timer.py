# SPDX-License-Identifier: Apache-2.0
"""A layer's forward and backward are timed while the timer is armed, and nothing else is.

The clock is made up: the layer moves it by what it takes.
"""

from __future__ import annotations

import time

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from comet_ds.observe.layer_timer import LayerTimer

FORWARD_MS, BACKWARD_MS = 20, 40


class Clock:
    """Seconds that pass only where ``spend`` says so."""

    now = 0.0

    def spend(self, milliseconds: float) -> None:
        self.now += milliseconds / 1e3


class Slow(torch.autograd.Function):
    """Takes its time on a clock."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, clock: Clock) -> torch.Tensor:
        clock.spend(FORWARD_MS)
        ctx.save_for_backward(x)
        ctx.clock = clock
        return x.clone()

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (x,) = ctx.saved_tensors  # which checkpointing computes again
        ctx.clock.spend(BACKWARD_MS)
        return grad + 0 * x, None


class SlowLayer(torch.nn.Module):
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return Slow.apply(hidden_states, self.clock), None, None


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> SlowLayer:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return SlowLayer(clock)


def step(layer: SlowLayer, *, needs_grad: bool = True, recomputes: bool = False) -> None:
    """Run forward and backward; the input needs a gradient, or only something beside it."""
    x = torch.ones(2, requires_grad=True)
    inner = x * 2 if needs_grad else torch.ones(2)
    if recomputes:
        output = checkpoint(layer, inner, use_reentrant=False)[0]
    else:
        output = layer(hidden_states=inner)[0]
    (output.sum() + x.sum()).backward()


def armed(layer: SlowLayer) -> LayerTimer:
    timer = LayerTimer(layer)
    timer.is_armed = True
    return timer


def test_forward_and_backward_are_timed(layer: SlowLayer) -> None:
    timer = armed(layer)
    for _ in range(2):
        step(layer)
    assert timer.read() == pytest.approx({"forward_ms": FORWARD_MS, "backward_ms": BACKWARD_MS})
    assert timer.read() == {}, "times are told once"


def test_what_is_run_again_belongs_to_backward(layer: SlowLayer) -> None:
    timer = armed(layer)
    step(layer, recomputes=True)
    expected = {"forward_ms": FORWARD_MS, "backward_ms": FORWARD_MS + BACKWARD_MS}
    assert timer.read() == pytest.approx(expected)


def test_no_backward_of_an_input_without_gradient(layer: SlowLayer) -> None:
    timer = armed(layer)
    step(layer, needs_grad=False)
    with torch.no_grad():
        layer(torch.ones(2))
    assert timer.read() == pytest.approx({"forward_ms": FORWARD_MS})


def test_another_branch_is_not_timed(layer: SlowLayer) -> None:
    """Its backward comes after the layer's and before the input's."""
    timer = armed(layer)
    inner = torch.ones(2, requires_grad=True) * 2
    beside = Slow.apply(inner, layer.clock)
    (beside + layer(inner)[0]).sum().backward()
    assert timer.read()["backward_ms"] == pytest.approx(BACKWARD_MS)


def test_nothing_is_timed_unarmed_or_in_evaluation(layer: SlowLayer) -> None:
    timer = LayerTimer(layer)
    step(layer)
    assert timer.read() == {}
    timer.is_armed = True
    layer.eval()
    step(layer)
    assert timer.read() == {}
    layer.train()
    layer(torch.ones(2))
    timer.is_armed = False  # what is timed already stays
    step(layer)
    assert timer.read() == pytest.approx({"forward_ms": FORWARD_MS})
