# SPDX-License-Identifier: Apache-2.0
"""Types of what csrc/bindings.cpp gives Python; the compiled module has no annotations.

T tokens of this rank, K routes per token, H hidden, F ffn, R rows of this rank's experts, E experts
of this rank, E_all of all ranks. Addresses of device memory, streams and events are integers; 0
stands for none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

# Events to record before and behind a launch, 0 for none.
EventPair = tuple[int, int]


class LayerCall(Protocol):
    """The launches of a layer for some sizes, csrc/autograd/layer_bindings.cpp.

    All run on the current stream. Every tensor's dtype and shape follow from the sizes.

    Attributes:
        has_peers: whether it exchanges rows with other ranks.
        num_row_dots: first dimension of ``row_dots``.
        workspace_bytes: size of a workspace.
        workspace_parts: name, offset in bytes, bytes of an item and shape of each part.

    Raises:
        ValueError: of every method, naming the tensor that does not fit.
    """

    @property
    def has_peers(self) -> bool: ...
    @property
    def num_row_dots(self) -> int: ...
    @property
    def workspace_bytes(self) -> int: ...
    @property
    def workspace_parts(self) -> list[tuple[str, int, int, list[int]]]: ...

    def begin(self, *, tokens: Tensor, side_stream: int) -> None:
        """Publish the tokens [T, H] to the other ranks, or start to send them.

        Args:
            tokens: [T, H].
            side_stream: address of the stream that copies run on.
        """
        ...

    def forward(
        self,
        *,
        tokens: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        slot_in_expert: Tensor,
        kept_counts: Tensor,
        workspace: Tensor,
        rows: Tensor,
        hidden: Tensor,
        pre: Sequence[Tensor],
        results: Tensor,
        output: Tensor,
        events: Sequence[EventPair] = ...,
        exposure: int = 0,
        side_stream: int = 0,
        part: str = "all",
    ) -> None:
        """Launch a forward.

        Args:
            tokens: [T, H].
            topk_ids: [T, K] int64, -1 = dropped.
            topk_weights: [T, K] fp32.
            slot_in_expert: [T, K] int32, position among this rank's routes to the expert.
            kept_counts: [E_all] int32.
            workspace: [workspace_bytes] uint8, written.
            rows: [R, H], written: dispatched tokens.
            hidden: [R, F], written: activations.
            pre: pre-activations [R, F] of gate and up, or of up, written; empty where there is no
                backward.
            results: [R, H], written.
            output: [T, H], written.
            events: of the up and the down GEMM.
            exposure: address of an ``Exposure``, added to.
            side_stream: as in ``begin``.
            part: "all", or "plan", "dispatch", "up" or "down" alone.
        """
        ...

    def backward_down(
        self,
        *,
        grad: Tensor,
        workspace: Tensor,
        grad_rows: Tensor,
        pre: Sequence[Tensor],
        grad_pre: Sequence[Tensor],
        weighted_hidden: Tensor,
        row_dots: Tensor,
        grad_weights: Tensor,
        grad_down: Tensor | None = None,
        grad_down_bias: Tensor | None = None,
        adds_to_down: bool = False,
        events: EventPair = ...,
        exposure: int = 0,
        only_gemm: bool = False,
    ) -> None:
        """Launch the backward of combine, down and the activation.

        Args:
            grad: [T, H], of the output.
            workspace: the forward's.
            grad_rows: [R, H], written.
            pre: the forward's.
            grad_pre: as ``pre``, written; may be the same tensors.
            weighted_hidden: [R, F], written.
            row_dots: [num_row_dots, R] fp32, written.
            grad_weights: [T, K] fp32, written where one rank is alone.
            grad_down: [E, H, F], written; None where nobody needs it.
            grad_down_bias: [E, H], likewise.
            adds_to_down: add to what ``grad_down`` holds.
            events: of the GEMM.
            exposure: address of an ``Exposure``, added to.
            only_gemm: leave out what lies around the GEMM.
        """
        ...

    def backward_up(
        self,
        *,
        workspace: Tensor,
        grad_pre: Sequence[Tensor],
        rows: Tensor,
        grad_rows: Tensor | None = None,
        grad_first: Tensor | None = None,
        grad_first_bias: Tensor | None = None,
        adds_to_first: bool = False,
        events: EventPair = ...,
        exposure: int = 0,
        only_gemm: bool = False,
    ) -> None:
        """Launch the backward of up and gate, towards the tokens.

        Args:
            workspace: the forward's.
            grad_pre: from ``backward_down``.
            rows: the forward's.
            grad_rows: [R, H], written; None where the tokens need no gradient.
            grad_first: [E, F, H] of gate, or of up without a gate, written; None where nobody needs
                it.
            grad_first_bias: [E, F], likewise.
            adds_to_first: add to what ``grad_first`` holds.
            events: of the GEMM.
            exposure: address of an ``Exposure``, added to.
            only_gemm: leave out what lies around the GEMM.
        """
        ...

    def sum_grads(
        self,
        *,
        workspace: Tensor,
        grad_rows: Tensor,
        grad_tokens: Tensor,
        grad_weights: Tensor,
        exposure: int = 0,
    ) -> None:
        """Launch the sum of a token's rows: ``grad_tokens`` [T, H] and ``grad_weights`` [T, K]."""
        ...

    def weight_grad(
        self,
        *,
        workspace: Tensor,
        a: Tensor,
        b: Tensor,
        grad: Tensor,
        grad_bias: Tensor | None = None,
        adds: bool = False,
        is_down: bool,
    ) -> None:
        """Launch ``grad[e] = a[rows of e].T @ b[rows of e]``.

        Args:
            workspace: the forward's.
            a, b: of down [R, H] and [R, F], else [R, F] and [R, H].
            grad: [E, H, F] of down, else [E, F, H]; written.
            grad_bias: sums of ``a``'s rows, written; None where nobody needs them.
            adds: add to what ``grad`` holds.
            is_down: whether it is down's.
        """
        ...


class MatrixOf(Protocol):
    """Enumeration of an expert's matrices; ``__members__`` has them by "gate", "up", "down"."""

    @property
    def __members__(self) -> dict[str, MatrixOf]: ...


class ParameterGroup(Protocol):
    """The weights or biases of one matrix of all experts, csrc/autograd/experts_autograd.h."""


class ExpertParameters(Protocol):
    """The parameters of a layer's experts: of weights, then of biases.

    Attributes:
        num_added: gradients that the kernels have added to those of micro-batches before.
    """

    @property
    def num_added(self) -> int: ...

    def are_in_place(self) -> bool:
        """Return whether all parameters have the addresses they had at first."""
        ...


class PeerStreams(Protocol):
    """What orders the calls of a group on this rank.

    Attributes:
        generation: how often the group's memory has moved.
        is_captured: whether a CUDA graph has captured a call.
    """

    generation: int

    @property
    def is_captured(self) -> bool: ...

    def enter(self) -> int:
        """Let the current stream wait for the call before; return the side stream's address."""
        ...

    def set_side(self, side_stream: int, /) -> None:
        """Set the side stream."""
        ...


class PreparedLaunches(Protocol):
    """The launches of a layer for some sizes, in both directions.

    Attributes:
        forward, backward: they differ in where tokens lie, if copy engines send them.
        generation: of the memory whose addresses they hold.
    """

    @property
    def forward(self) -> LayerCall: ...
    @property
    def backward(self) -> LayerCall: ...
    @property
    def generation(self) -> int: ...


class Watch(Protocol):
    """ModuleWatch and SlotWatch, csrc/autograd/module_watch.cpp."""

    def is_unchanged(self) -> bool:
        """Return whether what was given at first is still as it was then."""
        ...


class WatchMaker(Protocol):
    """``Kernels.ModuleWatch``."""

    def __call__(self, attributes: list[dict[str, Any]], /) -> Watch: ...
