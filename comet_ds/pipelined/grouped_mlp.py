# SPDX-License-Identifier: Apache-2.0
"""Applying a rank's experts to their rows: grouped GEMM for MLPs, else module by module."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comet_ds.experts.calls import run_container, run_experts
from comet_ds.experts.mlp import ACTIVATIONS, ExpertMLP, RecognisedExperts
from comet_ds.experts.views import find_stack

# From this many FLOP per expert and matrix, separate GEMMs are as fast as a grouped one, and they
# need no stacked copy of the weights (H200: Phi-3.5's experts, 107 GFLOP, are 3% faster one by
# one; OLMoE's, 9 GFLOP, are 44% slower).
LARGE_GEMM_FLOP = 40e9

# torch.nn.functional.grouped_mm requires addresses and outer strides to be multiples of 16 bytes.
GEMM_ALIGNMENT_BYTES = 16


class ExpertRunner:
    """Applies the local experts of one layer to expert-major rows.

    If all experts are recognised MLPs of one form, in bf16 on a CUDA device, torch's grouped GEMM
    computes them: one launch per matrix for any number of experts, and row counts stay on the
    device. Otherwise the modules are called one by one.

    Args:
        experts: the layer's expert modules.
        grouped_gemm: False always calls the modules.

    Attributes:
        experts: the layer's expert modules; checked for changes on every call.
        container: module to call once for all experts; None to call them separately.
        overridden: why the modules must be called; None if grouped GEMM may replace them.
        reason: why grouped GEMM does not apply; None if it does. Set by ``refresh``.
    """

    def __init__(self, experts: Sequence[nn.Module], *, grouped_gemm: bool = True) -> None:
        self.experts = experts
        self.grouped_gemm = grouped_gemm
        self.container: nn.Module | None = None
        self.overridden: str | None = None
        self.reason: str | None = "refresh was not called"
        self._mlps: list[ExpertMLP] = []
        self._recognised = RecognisedExperts()

    def refresh(self, x: Tensor, expected_rows: float) -> None:
        """Decide how to run; recognise the experts again if they have changed.

        Args:
            x: [T, H]; the layer's input.
            expected_rows: mean number of rows of an expert.
        """
        self.reason = self._why_not_grouped(x)
        if self.reason is None:
            flop = 2 * expected_rows * self._mlps[0].up.weight.numel()
            if flop >= LARGE_GEMM_FLOP:
                self.reason = f"{self._mlps[0].describe()} large enough to fill the GPU alone"

    def are_mlps(self) -> bool:
        """Return whether all experts are recognised MLPs, which accept only their own dtype."""
        if self.overridden is not None or not self.experts:
            return False
        return not isinstance(self._recognised.find(self.experts), str)

    def describe(self) -> str:
        """Return a phrase for the log line."""
        if self.reason is None:
            return f"{self._mlps[0].describe()} experts by grouped GEMM"
        how = "one by one" if self.container is None else "in one call"
        return f"experts {how} ({self.reason})"

    def stack(self, experts: range) -> list[Tensor | None]:
        """Return the matrices of n local experts as [n, ...] tensors for ``run``; differentiable.

        For all local experts of a layer with stacked parameters, these are the stacks themselves.

        Returns:
            [up, up bias, gate, gate bias, down, down bias], None for one that the experts do not
            have; an empty list if the experts run one by one.
        """
        if self.reason is not None:
            return []
        mlps = self._mlps[experts.start : experts.stop]
        columns = [[m.up, m.gate, m.down] for m in mlps]
        stacked: list[Tensor | None] = []
        for linears in zip(*columns, strict=True):
            for name in ("weight", "bias"):
                params = [getattr(linear, name, None) for linear in linears]
                if params[0] is None:
                    stacked.append(None)
                elif (stack := find_stack(linears, name)) is not None:
                    matrices = stack.view(len(linears), *params[0].shape)
                    is_aligned = matrices.data_ptr() % GEMM_ALIGNMENT_BYTES == 0
                    stacked.append(matrices if is_aligned else matrices.clone())
                else:
                    stacked.append(_Stack.apply(*params))
        return stacked

    def run(
        self,
        rows: Tensor,
        experts: range,
        stacked: Sequence[Tensor | None],
        offsets: Tensor,
        host_counts: Sequence[int] | None,
    ) -> Tensor:
        """Apply a range of the experts.

        Args:
            rows: [R, H], expert-major. With grouped GEMM there may be rows after the last
                expert's; their outputs are undefined.
            experts: local experts that own the rows.
            stacked: ``stack(experts)``.
            offsets: [n] int32, device; end of each expert's rows.
            host_counts: number of rows of each expert, on the host; may be None if ``reason`` is
                None.

        Returns:
            [R, H].
        """
        if self.reason is None:
            activation = self._mlps[0].activation
            return grouped_mlp(rows, offsets, stacked, activation=activation)
        assert host_counts is not None, "modules are called with rows that the host has counted"
        modules = [self.experts[i] for i in experts]
        return run_experts(modules, rows, host_counts)

    def run_all(
        self,
        rows: Tensor,
        segments: Sequence[tuple[int, int, int]],
        ep_size: int,
        num_local_experts: int,
    ) -> Tensor:
        """Apply ``container`` to the rows of all local experts; see ``run_container``."""
        assert self.container is not None, "without one, run() calls the experts"
        return run_container(self.container, rows, segments, ep_size, num_local_experts)

    def _why_not_grouped(self, x: Tensor) -> str | None:
        if self.overridden is not None:
            return self.overridden
        if not self.grouped_gemm:
            return "grouped GEMM is off in the configuration"
        if x.device.type != "cuda":
            return f"grouped GEMM needs a CUDA device, not {x.device.type}"
        if torch.cuda.get_device_capability(x.device) < (9, 0):
            return "grouped GEMM needs compute capability 9.0"
        if x.dtype != torch.bfloat16 or torch.is_autocast_enabled(x.device.type):
            return "grouped GEMM needs bfloat16 without autocast"
        return self._recognise()

    def _recognise(self) -> str | None:
        mlps = self._recognised.find(self.experts)
        if isinstance(mlps, str):
            return mlps
        self._mlps = mlps
        return _why_not_stackable(mlps)


def grouped_mlp(
    rows: Tensor, offsets: Tensor, stacked: Sequence[Tensor | None], *, activation: str
) -> Tensor:
    """Apply n expert MLPs to their rows.

    Args:
        rows: [R, H] bf16, expert-major.
        offsets: [n] int32; end of each expert's rows; the last is at most R.
        stacked: up [n, F, H], up bias [n, F], gate [n, F, H], gate bias [n, F], down [n, H, F],
            down bias [n, H]; gate and biases may be None.
        activation: key of ``ACTIVATIONS``.

    Returns:
        [R, H] bf16, undefined from row offsets[-1] on. Gradients are deterministic, and zero for an
        expert without rows.
    """
    up, up_bias, gate, gate_bias, down, down_bias = stacked
    assert up is not None and down is not None
    act = ACTIVATIONS[activation]
    hidden = _grouped_linear(rows, up, up_bias, offsets)
    if gate is None:
        hidden = act(hidden)
    else:
        hidden = act(_grouped_linear(rows, gate, gate_bias, offsets)) * hidden
    return _grouped_linear(hidden, down, down_bias, offsets)


def _grouped_linear(rows: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    output = F.grouped_mm(rows, weight.transpose(1, 2), offs=offsets)
    return output if bias is None else _AddBias.apply(output, bias, offsets)


class _Stack(torch.autograd.Function):
    """Stack n parameters into one [n, ...] tensor; backward gives each its slice of the gradient.

    ZeRO lays the parameters of a layer's experts out at a constant stride in one buffer. There the
    result is a view of that buffer, without a copy.
    """

    @staticmethod
    def forward(ctx: Any, *params: Tensor) -> Tensor:
        stride = _constant_stride(params)
        if stride is None:
            return torch.stack(params)
        first = params[0]
        return torch.as_strided(
            first.detach(), (len(params), *first.shape), (stride, *first.stride())
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad.unbind()


def _constant_stride(params: Sequence[Tensor]) -> int | None:
    """Return the distance between parameters in elements, None if no strided view holds them."""
    pointers = [p.data_ptr() for p in params]
    steps = {b - a for a, b in itertools.pairwise(pointers)}
    if len(steps) != 1:
        return None
    step, align = steps.pop(), GEMM_ALIGNMENT_BYTES
    if step <= 0 or step % align or pointers[0] % align:
        return None
    storages = {p.untyped_storage().data_ptr() for p in params}
    if len(storages) > 1 or not all(p.is_contiguous() for p in params):
        return None
    return step // params[0].element_size()


class _AddBias(torch.autograd.Function):
    """rows[r] + bias[expert of r]; the bias gradient is a grouped GEMM with ones, no atomics."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, bias: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(offsets)
        row = torch.arange(rows.shape[0], device=rows.device, dtype=offsets.dtype)
        expert = torch.searchsorted(offsets, row, right=True).clamp_(max=bias.shape[0] - 1)
        return rows + bias.index_select(0, expert)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (offsets,) = ctx.saved_tensors
        grad = grad.contiguous()
        # Eight bf16 columns are 16 bytes, which keeps the operand's strides aligned.
        ones = torch.ones(grad.shape[0], 8, dtype=grad.dtype, device=grad.device).t()
        return grad, F.grouped_mm(ones, grad, offs=offsets)[:, 0], None


def _why_not_stackable(mlps: Sequence[ExpertMLP]) -> str | None:
    """Return why the matrices of recognised experts cannot share grouped GEMMs, or None."""
    ffn, hidden = mlps[0].up.weight.shape
    for mlp in mlps:
        shapes = [tuple(m.weight.shape) for m in (mlp.gate or mlp.up, mlp.down)]
        if shapes != [(ffn, hidden), (hidden, ffn)]:
            return f"grouped GEMM needs up and gate [F, H] and down [H, F], got {shapes}"
    for size in (ffn, hidden):
        if size * mlps[0].up.weight.element_size() % GEMM_ALIGNMENT_BYTES:
            return f"grouped GEMM needs sizes that are multiples of 8, got {size}"
    if any(m.up.weight.dtype != torch.bfloat16 for m in mlps):
        return "grouped GEMM needs bfloat16 parameters"
    return None
