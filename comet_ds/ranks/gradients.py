# SPDX-License-Identifier: Apache-2.0
"""Agreement on which gradients a backward computes, and refusal of higher derivatives.

The backward of an expert parallel layer exchanges rows as its forward does, so either all ranks of
the group take part or none does. Ranks may differ in the gradients they need: one rank's input may
not require grad, its experts may be frozen, it may have no tokens. So every rank states its needs
in a message that all ranks exchange anyway, and all attach the same exchanges to their graphs.
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
        x: [..., H]; the layer's input.
        weights: the routing weights, or the tensors they are computed from.
        parameters: the experts' parameters; read up to the first that requires a gradient.

    Returns:
        A bit mask of ``NUM_NEED_BITS`` bits; 0 under ``torch.no_grad``.
    """
    if not torch.is_grad_enabled():
        return 0
    bits = _GRAD_MODE | _INPUT * x.requires_grad
    bits |= _WEIGHTS * any(weight.requires_grad for weight in weights)
    return bits | _EXPERTS * any(param.requires_grad for param in parameters)


class BackwardNeeds(NamedTuple):
    """Which gradients at least one rank of a group needs; the same on all its ranks.

    Attributes:
        input: whether a rank needs the gradient of its tokens.
        weights: whether a rank needs the gradient of its routing weights.
        experts: whether a rank needs the gradient of its experts' parameters.
        absent: first rank of the group that ran the forward under ``torch.no_grad`` and therefore
            has no backward; None if all ranks have one.
    """

    input: bool
    weights: bool
    experts: bool
    absent: int | None = None

    @classmethod
    def agree(cls, bits: Sequence[int]) -> BackwardNeeds:
        """Merge the masks that ``find_needs`` returned, in order of the group's ranks."""
        modes = [bool(b & _GRAD_MODE) for b in bits]
        absent = modes.index(False) if False in modes else None
        input, weights, experts = (
            any(b & bit for b in bits) for bit in (_INPUT, _WEIGHTS, _EXPERTS)
        )
        return cls(input, weights, experts, absent)

    @property
    def has_any(self) -> bool:
        """Whether there is a gradient to compute."""
        return self.input or self.weights or self.experts

    def check_present(self) -> None:
        """Refuse a backward in which a rank will not take part.

        Raises:
            RuntimeError: a rank ran the forward under ``torch.no_grad``; names the rank.
        """
        if self.absent is not None:
            raise RuntimeError(
                f"rank {self.absent} of the expert parallel group ran this forward without "
                "gradients (torch.no_grad), so it cannot take part in the backward: run it with "
                "gradients on all ranks of the group or on none"
            )


def anchor(like: Tensor, needs_grad: bool = True) -> Tensor:
    """Return an empty leaf tensor.

    Args:
        like: gives the dtype and device.
        needs_grad: whether a node that takes the anchor becomes part of the autograd graph.
    """
    return like.new_empty(0).requires_grad_(needs_grad)


def first_order_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the backward of an autograd function whose results must not be differentiated.

    torch's ``once_differentiable`` raises only if an incoming gradient requires grad. The gradient
    of ``output.sum()`` does not, and its second derivative is silently wrong. Here every second
    derivative raises.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Tensor | None) -> Any:
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return results
        results = list(results) if isinstance(results, tuple) else [results]
        indices = [i for i, grad in enumerate(results) if isinstance(grad, Tensor)]
        if indices:
            name = type(ctx).__name__.removesuffix("Backward")
            tensors = [results[i] for i in indices]
            refused = _RefuseBackward.apply(name, anchor(tensors[0]), *tensors)
            for i, grad in zip(indices, refused, strict=True):
                results[i] = grad
        return tuple(results)

    return wrapper


class _RefuseBackward(torch.autograd.Function):
    """Identity in the forward; raises in the backward."""

    @staticmethod
    def forward(ctx: Any, name: str, anchor: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"{ctx.name.lstrip('_')} of comet_ds cannot be differentiated once more: its gradient "
            "comes from kernels, or is itself a second derivative. If a loss needs it "
            "(create_graph=True), use DeepSpeed's layer here, or run this one on the CPU"
        )
