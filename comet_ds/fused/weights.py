# SPDX-License-Identifier: Apache-2.0
"""The experts' matrices as the kernels of csrc/gemm/expert_gemm.cuh read them.

Shapes: H hidden, F ffn, E local experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from comet_ds.experts.mlp import ExpertMLP
from comet_ds.experts.views import find_stack, place_of_row
from comet_ds.kernels import Kernels, num_sms

ACTIVATION_CODES = {"gelu": 0, "gelu_tanh": 1, "relu": 2, "silu": 3}  # Activation in csrc
TENSOR_MAP_BYTES = 128
# The copy engine wants addresses and rows that are multiples of this.
ALIGNMENT_BYTES = 16


@dataclass(frozen=True)
class ParameterGroup:
    """The weights, or the biases, of the same Linear of all experts.

    Attributes:
        params: one stack [E, *shape] ([E * n] of vectors), or E parameters.
        is_stacked: whether it is one stack.
        slots: dictionaries, names and what stood there: any of them replaced means that the group
            is out of date.
    """

    params: list[nn.Parameter]
    is_stacked: bool
    slots: list[tuple[dict[str, Any], str, Any]]

    @classmethod
    def of(cls, linears: Sequence[nn.Linear], name: str) -> ParameterGroup:
        """Return the group of the parameters called ``name`` of experts 0, 1, ..."""
        stack = find_stack(linears, name)
        if stack is None:
            slots = [(m._parameters, name, getattr(m, name)) for m in linears]
            return cls([param for *_, param in slots], False, slots)
        place = place_of_row(linears[0], name)
        assert place is not None, "a stack has rows"
        experts, key, _ = place
        rows = linears[0].__dict__
        slots = [(*experts.slot(key), stack), (rows, "_parameters", rows["_parameters"])]
        return cls([stack], True, slots)

    def addresses(self, num_experts: int) -> list[int]:
        """Return where each expert's part lies."""
        if not self.is_stacked:
            return [param.data_ptr() for param in self.params]
        stack = self.params[0]
        part_bytes = stack.numel() // num_experts * stack.element_size()
        return [stack.data_ptr() + i * part_bytes for i in range(num_experts)]


class ExpertWeights:
    """The matrices of E equally formed MLPs, as the kernels see them.

    The parameters stay where they are; kept is a table of tensor maps on the device, and one of
    addresses for every bias. They belong to the parameters' addresses at the time of construction
    (``is_current``).

    Attributes:
        mlps: the MLPs.
        names: of the matrices: "gate" (where gated), "up", "down".
        weights, biases: the groups by name; no biases where the matrix has none.
        parameters: those of all weights, then of all biases, in the order of ``names``.
        handles: the same parameters for csrc/autograd/experts_autograd.h: ExpertParameters.
        is_gated, activation, ffn, hidden, dtype, device, num_sms: what the kernels need to know.
    """

    def __init__(self, mlps: Sequence[ExpertMLP], kernels: Kernels) -> None:
        self.mlps, self.kernels = mlps, kernels
        first = mlps[0]
        self.is_gated = first.gate is not None
        self.activation = first.activation
        weight = first.up.weight
        (self.ffn, self.hidden), self.dtype, self.device = weight.shape, weight.dtype, weight.device
        self.num_sms, self.num_experts = num_sms(self.device), len(mlps)
        self.names = ("gate", "up", "down") if self.is_gated else ("up", "down")
        linears = {name: [getattr(mlp, name) for mlp in mlps] for name in self.names}
        self.weights = {name: ParameterGroup.of(m, "weight") for name, m in linears.items()}
        self.biases = {
            name: ParameterGroup.of(m, "bias")
            for name, m in linears.items()
            if m[0].bias is not None
        }
        self._groups = [*self.weights.values(), *self.biases.values()]
        self.parameters = [param for group in self._groups for param in group.params]
        self._slots = kernels.SlotWatch([slot for group in self._groups for slot in group.slots])
        self.handles = kernels.ExpertParameters(
            self._handles_of(self.weights), self._handles_of(self.biases)
        )
        self._maps = self._make_maps()
        self._bias_tables = {
            name: torch.tensor(
                group.addresses(self.num_experts), dtype=torch.int64, device=self.device
            )
            for name, group in self.biases.items()
        }

    def describe(self) -> str:
        """Return a phrase for the log line."""
        stacked = "stacked " if self.weights["up"].is_stacked else ""
        return f"{stacked}{self.mlps[0].describe()}"

    def _handles_of(self, groups: dict[str, ParameterGroup]) -> list[Any]:
        matrices, make = self.kernels.MatrixOf.__members__, self.kernels.ParameterGroup
        return [make(matrices[name], g.params, g.is_stacked) for name, g in groups.items()]

    def _make_maps(self) -> Tensor:
        """Return the tensor maps of all matrices, by ``names`` and expert, on the device."""
        is_bfloat16 = self.dtype == torch.bfloat16
        maps = b"".join(
            self.kernels.tensor_maps(
                group.addresses(self.num_experts),
                *((self.hidden, self.ffn) if name == "down" else (self.ffn, self.hidden)),
                is_bfloat16,
            )
            for name, group in self.weights.items()
        )
        return torch.frombuffer(bytearray(maps), dtype=torch.uint8).to(self.device)

    def is_current(self) -> bool:
        """Whether the modules still have these parameters, and these are where they were."""
        return self._slots.is_unchanged() and self.handles.are_in_place()

    def map_addresses(self) -> list[int]:
        """Return the addresses of the tables of tensor maps of gate, up and down; 0 for no gate."""
        size, base = self.num_experts * TENSOR_MAP_BYTES, self._maps.data_ptr()
        found = [base + i * size for i in range(len(self.names))]
        return found if self.is_gated else [0, *found]

    def bias_addresses(self) -> list[int]:
        """Return the addresses of the tables of biases of gate, up and down; 0 for none."""
        tables = [self._bias_tables.get(name) for name in ("gate", "up", "down")]
        return [0 if table is None else table.data_ptr() for table in tables]


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
