# SPDX-License-Identifier: Apache-2.0
"""Timing the layers of a model while it trains."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from comet_ds._compat.torch import is_in_backward


class LayerTimer:
    """Times the forward and backward of a layer, while it is armed.

    On a GPU it records events and waits for nothing. Backward is timed only if the layer's input
    and output need gradients; under reentrant checkpointing the output of the first forward does
    not. Nothing is timed while a CUDA graph is captured.

    Attributes:
        is_armed: whether to time the forwards that begin from now on.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.is_armed = False
        self._spans: dict[str, list[list[Any]]] = {"forward_ms": [], "backward_ms": []}
        layer.register_forward_pre_hook(self._begin, with_kwargs=True)
        layer.register_forward_hook(self._end, with_kwargs=True)

    def read(self) -> dict[str, float]:
        """Return the mean ms of forward and backward, and forget them; waits for the device."""
        result = {}
        for name, spans in self._spans.items():
            times = [_milliseconds(*span) for span in spans if len(span) == 2]
            if times:
                result[name] = sum(times) / len(times)
            spans.clear()
        return result

    def mark(self, tensor: Tensor) -> Any:
        """Return the time on the CPU in s, or an event on the GPU, which may be reached later."""
        if tensor.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _is_timed(self, layer: nn.Module) -> bool:
        if not self.is_armed or not layer.training:  # most steps end here
            return False
        is_run_again = is_in_backward()  # by activation checkpointing
        # A captured event has no time.
        is_captured = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        return not is_run_again and not is_captured

    def _begin(
        self, layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]] | None:
        if not self._is_timed(layer):
            return None
        x = args[0] if args else kwargs["hidden_states"]
        self._spans["forward_ms"].append([self.mark(x)])
        if not x.requires_grad:
            return None
        span: list[Any] = []
        self._spans["backward_ms"].append(span)
        x = x.view_as(x)  # whose gradient is this layer's alone
        x.register_hook(lambda grad: span.append(self.mark(grad)) if span else None)
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    def _end(self, layer: nn.Module, args: Any, kwargs: Any, output: tuple[Tensor, ...]) -> None:
        if not self._is_timed(layer):
            return
        self._spans["forward_ms"][-1].append(self.mark(output[0]))
        backwards = self._spans["backward_ms"]
        if backwards and not backwards[-1] and output[0].requires_grad:
            span = backwards[-1]
            output[0].register_hook(lambda grad: span.append(self.mark(grad)))


def _milliseconds(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return 1e3 * (end - start)
    end.synchronize()
    return start.elapsed_time(end)
