# SPDX-License-Identifier: Apache-2.0
"""Which gradients a backward computes, agreed on by all ranks; and what refuses one more.

The backward of an expert parallel layer exchanges rows as its forward does, so either all ranks of
the group take part or none does. Whether a rank needs a gradient is its own affair: its input may
not want one, its experts may be frozen, it may have no tokens. So every rank tells the others, in
the message they wait for anyway, and all attach the same exchanges to their graphs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_GRAD_MODE, _INPUT, _WEIGHTS, _EXPERTS = 1, 2, 4, 8
NUM_NEED_BITS = 4


def find_needs(x: Tensor, weights: Iterable[Tensor], parameters: Iterable[Tensor]) -> int:
    """Return which gradients this rank needs, as bits for ``BackwardNeeds.agree``.

    Args:
        x: the layer's input.
        weights: what the routing weights come from, or they.
        parameters: the experts'; those behind the first that requires a gradient are not looked at.
    """
    if not torch.is_grad_enabled():
        return 0
    bits = _GRAD_MODE | _INPUT * x.requires_grad
    bits |= _WEIGHTS * any(weight.requires_grad for weight in weights)
    return bits | _EXPERTS * any(param.requires_grad for param in parameters)


class BackwardNeeds(NamedTuple):
    """Which gradients some rank of a group needs; the same on all its ranks.

    Attributes:
        input: of tokens.
        weights: of routing weights.
        experts: of expert parameters.
        absent: the first rank that ran the forward without gradients (``torch.no_grad``), and so
            has no backward; None if there is none.
    """

    input: bool
    weights: bool
    experts: bool
    absent: int | None = None

    @classmethod
    def agree(cls, bits: Sequence[int]) -> BackwardNeeds:
        """Put together what ``find_needs`` has returned on every rank."""
        modes = [bool(b & _GRAD_MODE) for b in bits]
        absent = modes.index(False) if False in modes else None
        return cls(*(any(b & bit for b in bits) for bit in (_INPUT, _WEIGHTS, _EXPERTS)), absent)

    @property
    def has_any(self) -> bool:
        return self.input or self.weights or self.experts

    def check_present(self) -> None:
        """Refuse a backward that a rank will not come to.

        Raises:
            RuntimeError: naming the rank.
        """
        if self.absent is not None:
            raise RuntimeError(
                f"rank {self.absent} of the expert parallel group ran this forward without "
                "gradients (torch.no_grad), so it cannot take part in the backward: run it with "
                "gradients on all ranks of the group or on none"
            )


def anchor(like: Tensor, needs_grad: bool = True) -> Tensor:
    """Return an empty tensor that attaches a node to the graph, if ``needs_grad``."""
    return like.new_empty(0).requires_grad_(needs_grad)


def first_order_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the backward of an autograd function whose results must not be differentiated.

    What torch's ``once_differentiable`` returns can be differentiated all the same where no
    incoming gradient requires one, as that of ``output.sum()``: gradients are then wrong in
    silence. Here every second derivative raises.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Tensor | None) -> Any:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return found
        found = list(found) if isinstance(found, tuple) else [found]
        places = [i for i, grad in enumerate(found) if isinstance(grad, Tensor)]
        if places:
            name = type(ctx).__name__.removesuffix("Backward")
            tensors = [found[i] for i in places]
            for i, grad in zip(
                places, _Refused.apply(name, anchor(tensors[0]), *tensors), strict=True
            ):
                found[i] = grad
        return tuple(found)

    return wrapper


class _Refused(torch.autograd.Function):
    """Gradients as they are, whose own gradient is an error."""

    @staticmethod
    def forward(ctx: Any, name: str, anchor: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"{ctx.name.lstrip('_')} of comet_ds cannot be differentiated once more: its gradient "
            "comes from kernels, or is itself a gradient of gradients. Where a loss needs them "
            "(create_graph=True), compute this layer with DeepSpeed's, or on the CPU"
        )
