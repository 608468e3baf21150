# SPDX-License-Identifier: Apache-2.0
"""Loading the compiled CUDA kernels, and two queries of the device."""

from __future__ import annotations

import enum
import functools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from deepspeed.utils import logger
from torch import Tensor

from comet_ds import bindings
from comet_ds._compat.torch import current_cuda_device, current_raw_stream


class Pass(enum.IntEnum):
    """Pass in csrc/gemm/expert_gemm.h."""

    UP = 0
    DOWN = 1
    DOWN_GRAD = 2
    UP_GRAD = 3
    WEIGHT_GRAD = 4


if TYPE_CHECKING:
    from comet_ds.op_builder.comet_moe import CometMoEBuilder


class Kernels(Protocol):
    """The compiled module: what csrc/bindings.cpp gives Python.

    Functions whose arguments are all integers take addresses of device memory, sizes and, last, the
    address of the stream.

    Attributes:
        fingerprint: of the sources.
        has_timeline: whether kernels can record what their CTAs do.
        record_lists, max_records: lists of a launch's CTA, and records in each.
        routes_per_block: routes that a block of ``plan_routes`` sorts.
        max_segments: most segments a plan has room for.
        row_block: each expert's rows are padded to a multiple of it.
        max_ranks, max_top_k: most ranks of a group and most routes of a token, on the fused path.
    """

    fingerprint: str
    has_timeline: bool
    record_lists: int
    max_records: int
    routes_per_block: int
    max_segments: int
    row_block: int
    max_ranks: int
    max_top_k: int
    MatrixOf: bindings.MatrixOf

    def combine_forward(self, *arguments: int) -> None:
        """Sum up every token's rows: ``CombineParams`` of csrc/rows/combine.h.

        Arguments: rows [R, H], row_of_route [T, K] int64 (-1 = dropped), weights [T, K] fp32 or 0
        for an unweighted sum, output [T, H]; T, K, H; code of the dtype, stream.
        """
        ...

    def combine_backward(self, *arguments: int) -> None:
        """Give the gradient of ``combine_forward``.

        Arguments: rows, row_of_route and weights as there, grad [T, H], grad_rows [R, H],
        grad_weights [T, K] fp32; T, K, H; code of the dtype, stream.
        """
        ...

    def plan_routes(self, *arguments: int) -> None:
        """Sort routes by segment: ``RoutePlanParams`` of csrc/rows/route_plan.h.

        Arguments: topk_ids [T, K] int64 (-1 = dropped), segment_of_expert [parts, E] int64,
        row_of_route [T, K] int64, token_of_row [T * K] int64, segment_counts [parts * E] int64,
        scratch [ceil(T * K / routes_per_block), segments + 1] int32; T, K, parts, E; stream.
        """
        ...

    def order_arrival(self, *arguments: int) -> None:
        """Order a chunk that has arrived by expert: ``ArrivalParams`` of csrc/rows/route_plan.h.

        Arguments: counts [W, E] int64, their stride in elements, order [R] int64, inverse [R]
        int64, offsets [E] int32; R, W, E; stream.
        """
        ...

    def can_plan(self, num_experts: int, num_ranks: int, /) -> bool:
        """Return whether a fused call's plan has room for so many experts of a rank."""
        ...

    def tensor_maps(
        self, addresses: Sequence[int], rows: int, cols: int, is_bfloat16: bool, /
    ) -> bytes:
        """Return the tensor maps of matrices [rows, cols], to be copied to the device."""
        ...

    def set_timeline_room(self, address: int, num_bytes: int, /) -> int:
        """Say where launches record; return how many bytes were left of the room before."""
        ...

    def gate_logits(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return x [T, H] bf16 times weight [E, H] bf16, transposed: [T, E] fp32."""
        ...

    def gate_logits_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, *, add_to: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of ``x`` and ``weight`` for ``grad`` [T, E]."""
        ...

    def route_tokens(
        self,
        x: Tensor,
        weight: Tensor,
        *,
        top_k: int,
        capacity: int | None,
        noise: Tensor | None,
        priority: Tensor | None,
        used_token: Tensor | None,
    ) -> list[Tensor]:
        """Choose routes from x [T, H] and weight [E, H], both bf16 and aligned to 16 bytes.

        Args:
            x, weight: the gate's input and matrix; H is a multiple of 8.
            top_k: K.
            capacity: most routes an expert accepts; None for no limit.
            noise: [T, E] fp32, added to the logits that second routes, or noisy ones, come from.
            priority: [T, E] fp32, decides which routes are kept where k is 1.
            used_token: [T]; 0 for a token that gets no route.

        Returns:
            topk_weights [T, K] fp32, l_aux 0-dim fp32, topk_ids [T, K] int64 (-1 = dropped),
            slot_in_expert [T, K] int32, kept_counts [E] int32, exp_counts [E] int64, and ``x`` with
            a gradient that joins the gate's and the experts'.
        """
        ...

    def route_logits(
        self,
        logits: Tensor,
        *,
        top_k: int,
        capacity: int | None,
        noise: Tensor | None,
        priority: Tensor | None,
        used_token: Tensor | None,
    ) -> list[Tensor]:
        """Choose routes from logits [T, E]; as ``route_tokens``, without the last result."""
        ...

    def LayerCall(
        self,
        *,
        hidden: int,
        ffn: int,
        num_experts: int,
        num_all_experts: int,
        top_k: int,
        max_rows: int,
        counts_rows: bool,
        num_tokens: Sequence[int],
        rank: int,
        num_sms: int,
        is_bfloat16: bool,
        is_gated: bool,
        activation: int,
        maps: Sequence[int],
        biases: Sequence[int],
        pull: Sequence[int] = ...,
        push: Sequence[int] = ...,
        pull_grad: Sequence[int] = ...,
        push_grad: Sequence[int] = ...,
        sources: Sequence[Sequence[int]] = ...,
        published: int = 0,
        flags: Sequence[int] = ...,
        topk_ids: Sequence[int] = ...,
        topk_weights: Sequence[int] = ...,
        slot_in_expert: Sequence[int] = ...,
        kept_counts: Sequence[int] = ...,
        tokens: Sequence[int] = ...,
        epoch: int = 0,
        late: int = 0,
        timeout_ns: int = 0,
        has_copy_engines: bool = True,
    ) -> bindings.LayerCall:
        """Prepare the launches of a layer, csrc/host/layer_call.h; integers in lists are addresses.

        Args:
            hidden, ffn, top_k: H, F, K.
            num_experts, num_all_experts: of this rank, of all ranks.
            max_rows: most rows of this rank's experts, a multiple of ``row_block``.
            counts_rows: whether R is counted on the host, and memory made for that many.
            num_tokens: of every rank.
            rank, num_sms: of this rank in the group, of its GPU.
            is_bfloat16, is_gated, activation: the experts'; code of the activation.
            maps, biases: tables on the device of gate, up and down; 0 for none.
            pull, push, pull_grad, push_grad: CTAs that communicate, experts that are split.
            sources: of each rank, what this one reads there, in the order of ``Source``.
            published: where the others read its tokens.
            flags: of each rank's mailbox.
            topk_ids, topk_weights, slot_in_expert, kept_counts, tokens: where this rank writes for
                the others, by distance; no tokens where they are pulled.
            epoch, late: counter of barriers, ``LateWait``.
            timeout_ns: of a wait on the device.
            has_copy_engines: whether they send tokens; else a kernel does.
        """
        ...

    def ParameterGroup(
        self, matrix: bindings.MatrixOf, params: Sequence[Tensor], is_stacked: bool
    ) -> bindings.ParameterGroup:
        """Put together a matrix's weights or biases: one stack, or one for each expert."""
        ...

    def ExpertParameters(
        self, weights: Sequence[bindings.ParameterGroup], biases: Sequence[bindings.ParameterGroup]
    ) -> bindings.ExpertParameters:
        """Put together a layer's."""
        ...

    def PeerStreams(self) -> bindings.PeerStreams:
        """Make a group's."""
        ...

    def PreparedLaunches(
        self,
        *,
        forward: bindings.LayerCall,
        backward: bindings.LayerCall,
        parameters: bindings.ExpertParameters,
        peers: bindings.PeerStreams | None,
    ) -> bindings.PreparedLaunches:
        """Put together a call's launches; ``peers`` is None where all experts are local."""
        ...

    def ModuleWatch(self, attributes: list[dict[str, Any]], /) -> bindings.Watch:
        """Watch modules, given their ``__dict__``: hooks, forwards, children, mode, dropout."""
        ...

    def SlotWatch(self, slots: Sequence[tuple[dict[str, Any], str, Any]], /) -> bindings.Watch:
        """Watch entries of dictionaries: (dictionary, key, value then)."""
        ...

    def run_experts(
        self,
        *,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        slot_in_expert: Tensor,
        kept_counts: Tensor,
        launches: bindings.PreparedLaunches,
        prepared: Any,
        trial: Any,
        meter: Any,
        needs: Any,
        side_stream: int,
    ) -> Tensor:
        """Run a fused call as a node of autograd's graph.

        Args:
            x: [T, H].
            topk_weights, topk_ids, slot_in_expert, kept_counts: as in ``LayerCall.forward``.
            launches: of its sizes.
            prepared: ``PreparedCall``; its ``current()`` is asked for launches in backward.
            trial: ``Trial`` or None; its ``events()`` time launches.
            meter: ``ExposureMeter`` or None.
            needs: ``BackwardNeeds``; None on one rank.
            side_stream: address of the stream of copies, 0 on one rank.

        Returns:
            [T, H].
        """
        ...


# Environment variable; with any value, the kernels that record a timeline are loaded.
TIMELINE_VARIABLE = "COMET_DS_TIMELINE"


def load_kernels(device: torch.device) -> Kernels | None:
    """Return the functions of csrc/bindings.cpp for a device; the first call builds them.

    Returns:
        None for devices other than CUDA. Also None, after one warning with the reason, if the
        kernels cannot be built or run; callers then use PyTorch operations.
    """
    return _build()[0] if device.type == "cuda" else None


def why_no_kernels() -> str | None:
    """Return why ``load_kernels`` gives None for CUDA devices, None if it gives the kernels."""
    return _build()[1]


def use_timeline_kernels() -> None:
    """Make this process load the kernels that record a timeline of their CTAs.

    Sets ``TIMELINE_VARIABLE``. If those kernels cannot be built, the normal ones are loaded.

    Raises:
        RuntimeError: the normal kernels are loaded already.
    """
    if _build.cache_info().currsize and not os.environ.get(TIMELINE_VARIABLE):
        raise RuntimeError("the kernels are loaded already, and cannot record a timeline")
    os.environ[TIMELINE_VARIABLE] = "1"


def num_sms(device: torch.device) -> int:
    """Return the number of SMs of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def current_stream(tensor: Tensor) -> int:
    """Return the address of the current stream of a tensor's device, for a kernel launch.

    The tensor's device must be the current one: ``MOELayer.forward`` and, in backward, autograd set
    it. (``torch.cuda.current_stream`` with a device guard takes 20 us of host time per launch.)

    Raises:
        RuntimeError: another device is the current one.
    """
    device, current = tensor.get_device(), current_cuda_device()
    if device != current:
        raise RuntimeError(f"the current CUDA device must be {device}, the tensor's, not {current}")
    return current_raw_stream(device)


@functools.cache
def _build() -> tuple[Kernels | None, str | None]:
    from comet_ds.op_builder.comet_moe import CometMoEBuilder, TimelineBuilder

    if os.environ.get(TIMELINE_VARIABLE):
        module, reason = _load(TimelineBuilder())
        if module is not None:
            return module, None
        logger.warning(f"comet_ds: no kernels that record a timeline: {reason}")
    module, reason = _load(CometMoEBuilder())
    if module is None:
        logger.warning(f"comet_ds: PyTorch operations instead of CUDA kernels: {reason}")
    return module, reason


def _load(builder: CometMoEBuilder) -> tuple[Kernels | None, str | None]:
    """Return a builder's module and None, or None and the reason."""
    reason = builder.why_not()
    if reason is None:
        try:
            # A compiled module shows no types: these are csrc/bindings.cpp's.
            return cast(Kernels, builder.load(verbose=False)), None
        except (RuntimeError, OSError, ImportError) as error:
            reason = f"the build failed: {error}"
    return None, reason
