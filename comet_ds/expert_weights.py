# SPDX-License-Identifier: Apache-2.0
"""The experts' matrices as the kernels of csrc/moe/expert_gemm.cuh read them.

Shapes: H hidden, F ffn, E local experts.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from comet_ds.expert_rows import find_stack, place_of_row
from comet_ds.experts import ExpertMLP
from comet_ds.kernels import num_sms

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
        experts, key, _ = place_of_row(linears[0], name)
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

    def as_grads(self, grad: Tensor) -> list[Tensor]:
        """Return the gradients of ``params`` from one [E, ...]."""
        if not self.is_stacked:
            return list(grad.unbind())
        return [grad.view(self.params[0].shape)]


class MatrixGrads(NamedTuple):
    """Gradients of one matrix of all experts.

    Attributes:
        weight: [E, m, n]; written by the kernels, or added to.
        bias: [E, m], written; None where there is no bias.
        stack: the parameter whose ``grad`` is ``weight``, where the kernels add to it; else None.
    """

    weight: Tensor
    bias: Tensor | None
    stack: nn.Parameter | None = None

    @property
    def is_added(self) -> bool:
        """Whether the kernels add to the gradient."""
        return self.stack is not None

    def hand_over(self) -> None:
        """Take the gradient out of the parameter, so that autograd puts it back, not adds it."""
        if self.stack is not None:
            self.stack.grad = None


class PendingUse:
    """A forward whose backward is to come; ends with it, or when its graph is freed."""

    def __init__(self, uses: Uses) -> None:
        self._uses: Uses | None = uses

    def end(self) -> None:
        """Note that the backward has run."""
        uses, self._uses = self._uses, None
        if uses is not None:
            uses._end()

    def __del__(self) -> None:
        self.end()


class Uses:
    """Counts the forwards of a layer whose backward is to come.

    Where there are several, autograd may put their gradients together before it accumulates them:
    what one of them adds to the parameter's gradient itself would be in limbo until then.
    """

    def __init__(self) -> None:
        self._num_pending, self._were_several = 0, False

    @property
    def is_single(self) -> bool:
        """Whether the one pending forward was the only one all the time."""
        return self._num_pending == 1 and not self._were_several

    def begin(self) -> PendingUse:
        """Note a forward."""
        self._num_pending += 1
        self._were_several |= self._num_pending > 1
        return PendingUse(self)

    def _end(self) -> None:
        self._num_pending -= 1
        self._were_several &= self._num_pending > 0


def _can_add_to_grad(stack: nn.Parameter, node: Any) -> bool:
    """Whether the kernels may add to a parameter's gradient in autograd's place.

    Autograd would add the new gradient to it, in place; with the new one already in it, it only has
    to put it back. That must not be seen by anyone: not by hooks of the parameter, which get the
    new gradient alone, nor by ``torch.autograd.grad``, which adds to none. (A hook on the node that
    accumulates, not on the parameter, would see the sum; DeepSpeed's read ``grad`` behind it.)
    """
    grad = stack.grad
    if grad is None or grad.dtype != stack.dtype or grad.requires_grad or stack._backward_hooks:
        return False
    if not grad.is_contiguous() or grad.data_ptr() % ALIGNMENT_BYTES:
        return False
    if type(node).__name__ != "AccumulateGrad":
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # what torch says of a leaf in torch.autograd.grad
        return False


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
        uses: forwards whose backward is to come.
        is_gated, activation, ffn, hidden, dtype, device, num_sms: what the kernels need to know.
    """

    def __init__(self, mlps: Sequence[ExpertMLP], kernels: ModuleType) -> None:
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
        self.uses = Uses()
        self._groups = [*self.weights.values(), *self.biases.values()]
        self.parameters = [param for group in self._groups for param in group.params]
        self._slots = [slot for group in self._groups for slot in group.slots]
        self._addresses = [param.data_ptr() for param in self.parameters]
        self._maps = self._make_maps()
        self._bias_tables = {
            name: torch.tensor(
                group.addresses(self.num_experts), dtype=torch.int64, device=self.device
            )
            for name, group in self.biases.items()
        }

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
        return all(found[name] is then for found, name, then in self._slots) and self.is_in_place()

    def is_in_place(self) -> bool:
        """Whether the parameters are where they were."""
        return [param.data_ptr() for param in self.parameters] == self._addresses

    def map_addresses(self) -> list[int]:
        """Return the addresses of the tables of tensor maps of gate, up and down; 0 for no gate."""
        size, base = self.num_experts * TENSOR_MAP_BYTES, self._maps.data_ptr()
        found = [base + i * size for i in range(len(self.names))]
        return found if self.is_gated else [0, *found]

    def bias_addresses(self) -> list[int]:
        """Return the addresses of the tables of biases of gate, up and down; 0 for none."""
        tables = [self._bias_tables.get(name) for name in ("gate", "up", "down")]
        return [0 if table is None else table.data_ptr() for table in tables]

    def new_grads(self, name: str, accumulators: Sequence[Any] = ()) -> MatrixGrads:
        """Return memory for the gradients of a matrix and its bias.

        Args:
            name: of the matrix.
            accumulators: nodes of autograd's graph that ``parameters`` lead to, in their order.
        """
        m, n = (self.hidden, self.ffn) if name == "down" else (self.ffn, self.hidden)
        options = {"dtype": self.dtype, "device": self.device}
        bias = torch.empty(self.num_experts, m, **options) if name in self.biases else None
        group = self.weights[name]
        if group.is_stacked and accumulators:
            stack, node = group.params[0], accumulators[self.names.index(name)]
            if _can_add_to_grad(stack, node):
                return MatrixGrads(stack.grad, bias, stack)
        return MatrixGrads(torch.empty(self.num_experts, m, n, **options), bias)

    def grads_in_order(self, grads: dict[str, MatrixGrads]) -> list[Tensor | None]:
        """Return the gradients of ``parameters``, None for all where there are none."""
        if not grads:
            return [None] * len(self.parameters)
        by_group = [(group, grads[name].weight) for name, group in self.weights.items()]
        by_group += [(group, grads[name].bias) for name, group in self.biases.items()]
        return [part for group, grad in by_group for part in group.as_grads(grad)]


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
