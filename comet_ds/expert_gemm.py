# SPDX-License-Identifier: Apache-2.0
"""The grouped GEMMs of the experts' MLPs: launching csrc/moe/expert_gemm.cuh.

Shapes: R allocated rows, H hidden, F ffn, E local experts. Rows are sorted by expert, each expert's
padded with zero rows to a multiple of ``row_block`` (``dispatcher.RowPlan``); rows behind the last
expert's are neither read nor written.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor, nn

from comet_ds.experts import ExpertMLP
from comet_ds.kernels import current_stream, num_sms

ACTIVATION_CODES = {"gelu": 0, "gelu_tanh": 1, "relu": 2, "silu": 3}  # Activation in csrc
TENSOR_MAP_BYTES = 128
# The copy engine wants addresses and rows that are multiples of this.
ALIGNMENT_BYTES = 16


class Pass(enum.IntEnum):
    """Pass in csrc/moe/expert_gemm.h."""

    UP = 0
    DOWN = 1
    DOWN_GRAD = 2
    UP_GRAD = 3
    WEIGHT_GRAD = 4


# Of ``ExpertRows``, where rows or results travel meanwhile; DOWN's is computed backwards.
ORDERS = {Pass.UP: 1, Pass.DOWN_GRAD: 2, Pass.DOWN: 3}


@dataclass(frozen=True)
class ExpertRows:
    """Which rows belong to which expert.

    Attributes:
        expert_offsets: [E + 1] int32; first row of each expert, multiples of ``row_block``.
        block_order: [N, R / row_block] int32; the order in which blocks are computed. Where rows
            or results travel meanwhile, N = 4: by expert, then as ``ORDERS`` says.
        expert_order: [N, R / row_block] int32; these blocks' experts.
        max_rows: R.
    """

    expert_offsets: Tensor
    block_order: Tensor
    expert_order: Tensor
    max_rows: int


class Observer(Protocol):
    """Who times launches."""

    def timed(self, gemm: Pass) -> AbstractContextManager[None]:
        """Return what a launch happens in."""


class ExpertWeights:
    """The matrices of E equally formed MLPs, as the kernels see them.

    The parameters stay where they are; kept is one table of tensor maps, and one of addresses for
    biases. They belong to the parameters' addresses at the time of construction (``is_current``).

    Attributes:
        mlps: the MLPs.
        parameters: weights, then biases; each in the order of gate (where gated), up, down, and
            within one of these by expert.
    """

    def __init__(self, mlps: Sequence[ExpertMLP], kernels: ModuleType) -> None:
        self.mlps, self.kernels = mlps, kernels
        first = mlps[0]
        self.is_gated = first.gate is not None
        self.activation = first.activation
        self.ffn, self.hidden = first.up.weight.shape
        names = ("gate", "up", "down") if self.is_gated else ("up", "down")
        linears: list[list[nn.Linear]] = [[getattr(m, name) for m in mlps] for name in names]
        self.weights = [[linear.weight for linear in group] for group in linears]
        self.biases = [
            None if group[0].bias is None else [linear.bias for linear in group]
            for group in linears
        ]
        # Where the modules keep them: a parameter may be replaced by another.
        names = ["weight"] * len(linears) + ["bias"] * sum(b is not None for b in self.biases)
        groups = linears + [g for g, b in zip(linears, self.biases, strict=True) if b is not None]
        self._slots = [
            (linear._parameters, name)
            for group, name in zip(groups, names, strict=True)
            for linear in group
        ]
        self.parameters = [parameters[name] for parameters, name in self._slots]
        self.dtype, self.device = first.up.weight.dtype, first.up.weight.device
        self.num_sms = num_sms(self.device)
        self._addresses = self._read_addresses()
        is_bfloat16 = self.dtype == torch.bfloat16
        maps = b"".join(
            kernels.tensor_maps([p.data_ptr() for p in group], *group[0].shape, is_bfloat16)
            for group in self.weights
        )
        self._maps = torch.frombuffer(bytearray(maps), dtype=torch.uint8).to(self.device)
        self._bias_tables = [
            None
            if group is None
            else torch.tensor([p.data_ptr() for p in group], dtype=torch.int64, device=self.device)
            for group in self.biases
        ]

    def is_current(self) -> bool:
        """Whether the modules still have these parameters, and these are where they were."""
        return (
            all(slots[name] is p for (slots, name), p in zip(self._slots, self.parameters))  # noqa: B905
            and self.is_in_place()
        )

    def is_in_place(self) -> bool:
        """Whether the parameters are where they were."""
        return self._read_addresses() == self._addresses

    def map_addresses(self, *indices: int) -> tuple[int, int]:
        """Return the addresses of the tensor maps of one or two groups of ``weights``."""
        size = len(self.mlps) * TENSOR_MAP_BYTES
        found = [self._maps.data_ptr() + i * size for i in indices]
        return (*found, 0, 0)[:2]

    def bias_addresses(self, *indices: int) -> tuple[int, int]:
        """Return the addresses of the bias tables of one or two groups, 0 without biases."""
        tables = [self._bias_tables[i] for i in indices]
        found = [0 if t is None else t.data_ptr() for t in tables]
        return (*found, 0, 0)[:2]

    def _read_addresses(self) -> list[int]:
        return [p.data_ptr() for p in self.parameters]


def why_not_addressable(mlps: Sequence[ExpertMLP], x: Tensor) -> str | None:
    """Return why the kernels cannot read the parameters in place for an input, or None."""
    (ffn, hidden), width = mlps[0].up.weight.shape, x.shape[-1]
    for size in (ffn, hidden):
        if size * x.element_size() % ALIGNMENT_BYTES:
            return f"the kernels need sizes that are multiples of 8, got {size}"
    for mlp in mlps:
        shapes = [tuple(m.weight.shape) for m in (mlp.gate or mlp.up, mlp.up, mlp.down)]
        if hidden != width or shapes != [(ffn, hidden), (ffn, hidden), (hidden, ffn)]:
            return f"matrices of shapes {shapes} do not make an MLP on {width} features"
    linears = [m for mlp in mlps for m in (mlp.gate, mlp.up, mlp.down) if m is not None]
    for param in (p for linear in linears for p in linear.parameters()):
        if param.dtype != x.dtype or param.device != x.device:
            return f"the experts are {param.dtype} on {param.device}, the input {x.dtype}"
        # Biases are read two elements at a time.
        alignment = ALIGNMENT_BYTES if param.dim() == 2 else 2 * param.element_size()
        if param.data_ptr() % alignment or not param.is_contiguous():
            return f"the kernels need contiguous parameters at multiples of {alignment} bytes"
    return None


class ExpertGemm:
    """The passes over one layer's experts and one call's rows. Launches on the current stream.

    ``beside``, where a pass takes it, is what CTAs set apart do meanwhile: ``Communication`` of
    csrc/moe/exchange.h.

    Args:
        weights: the experts.
        rows: whose rows are whose.
        observer: is told of every launch that something goes on beside, by a context manager.
    """

    def __init__(
        self, weights: ExpertWeights, rows: ExpertRows, observer: Observer | None = None
    ) -> None:
        self.weights, self.rows, self.observer = weights, rows, observer
        self._down = 2 if weights.is_gated else 1
        self._ups = (0, 1) if weights.is_gated else (0,)
        self._nothing = weights.kernels.Communication()

    def up(
        self,
        x: Tensor,
        hidden: Tensor,
        pre: Sequence[Tensor] | None,
        *,
        beside: object | None = None,
    ) -> None:
        """Compute hidden = act(x up^T + bias), gated act(x gate^T + bias) * (x up^T + bias).

        Args:
            x: [R, H] bf16 or fp16, like all tensors here.
            hidden: [R, F], written.
            pre: what the activation is applied to, [R, F] each, written: [gate, up] or [up]; None
                not to keep them.
        """
        w = self.weights
        results = [hidden, *(pre if pre is not None else [hidden] * len(self._ups))]
        self._launch(
            Pass.UP,
            [x],
            [],
            results,
            self._ups,
            n=w.ffn,
            k=w.hidden,
            save_pre=pre is not None,
            beside=beside,
        )

    def down(self, hidden: Tensor, y: Tensor, *, beside: object | None = None) -> None:
        """Compute y [R, H] = hidden [R, F] down^T + bias."""
        w = self.weights
        self._launch(
            Pass.DOWN, [hidden], [], [y], (self._down,), n=w.hidden, k=w.ffn, beside=beside
        )

    def down_grad(
        self,
        dy: Tensor,
        row_weights: Tensor,
        pre: Sequence[Tensor],
        dpre: Sequence[Tensor],
        weighted_hidden: Tensor,
        *,
        beside: object | None = None,
    ) -> Tensor:
        """Go back through ``down``, the routing weight and the activation.

        Args:
            dy: [R, H]; gradient of the token's output, not multiplied by the routing weight.
            row_weights: [R] fp32; routing weight of each row, 0 in padding.
            pre: as ``up`` left them.
            dpre: their gradients, [R, F] each, written.
            weighted_hidden: [R, F], written: row_weights * hidden, which the weight gradient of
                ``down`` needs.

        Returns:
            [tiles, R] fp32; its sum over tiles is <dy down, hidden> for every row.
        """
        w = self.weights
        num_tiles = -(-w.ffn // w.kernels.down_grad_tile_cols)
        row_dots = row_weights.new_empty(num_tiles, self.rows.max_rows)
        self._launch(
            Pass.DOWN_GRAD,
            [dy],
            pre,
            [weighted_hidden, *dpre],
            (self._down,),
            n=w.ffn,
            k=w.hidden,
            row_weights=row_weights,
            row_dots=row_dots,
            beside=beside,
        )
        return row_dots

    def up_grad(self, dpre: Sequence[Tensor], dx: Tensor) -> None:
        """Compute dx [R, H] = dpre_up up, gated + dpre_gate gate."""
        w = self.weights
        self._launch(Pass.UP_GRAD, dpre, [], [dx], self._ups, n=w.hidden, k=w.ffn)

    def weight_grad(
        self, a: Tensor, b: Tensor, grad: Tensor, *, beside: object | None = None
    ) -> None:
        """Compute grad[e] = a^T b over the rows of expert e.

        Args:
            a, b: [R, m], [R, n].
            grad: [E, m, n], written; zero for an expert without rows.
        """
        _, m, n = grad.shape
        self._launch(Pass.WEIGHT_GRAD, [a], [b], [grad], (), m=m, n=n, beside=beside)

    def _launch(
        self,
        which: Pass,
        a: Sequence[Tensor],
        b: Sequence[Tensor],
        results: Sequence[Tensor],
        groups: tuple[int, ...],
        *,
        m: int = 0,
        n: int,
        k: int = 0,
        save_pre: bool = False,
        row_weights: Tensor | None = None,
        row_dots: Tensor | None = None,
        beside: object | None = None,
    ) -> None:
        if beside is not None and self.observer is not None:
            observed = self.observer.timed(which)
        else:
            observed = contextlib.nullcontext()
        w, rows = self.weights, self.rows
        order = ORDERS.get(which, 0) if beside is not None else 0
        # A gradient of a linear function has no bias.
        has_bias = which in (Pass.UP, Pass.DOWN)
        arguments = (
            int(which),
            w.dtype == torch.bfloat16,
            w.is_gated,
            ACTIVATION_CODES[w.activation],
            [_matrix(t) for t in a],
            [_matrix(t) for t in b],
            [_matrix(t) for t in results],
            w.map_addresses(*groups),
            w.bias_addresses(*groups) if has_bias else (0, 0),
            rows.expert_offsets.data_ptr(),
            rows.block_order[order].data_ptr(),
            rows.expert_order[order].data_ptr(),
            0 if row_weights is None else row_weights.data_ptr(),
            0 if row_dots is None else row_dots.data_ptr(),
            len(w.mlps),
            rows.max_rows,
            m,
            n,
            k,
            save_pre,
            w.num_sms,
            beside or self._nothing,
            current_stream(rows.expert_offsets),
        )
        with observed:
            w.kernels.expert_gemm(*arguments)


def _matrix(tensor: Tensor) -> tuple[int, int, int, int]:
    """Return address, batch, rows, columns."""
    *batch, rows, cols = tensor.shape
    return tensor.data_ptr(), *(batch or (1,)), rows, cols
