# SPDX-License-Identifier: Apache-2.0
"""Recognising expert modules that compute an MLP.

Experts are the user's own modules. A module is recognised by what it computes, never by the name of
its class. It is traced; the graph must be one of

    down(act(up(x)))                 two-matrix MLP
    down(act(gate(x)) * up(x))       gated MLP

and the recognised form must reproduce the module's output for a probe input.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from comet_ds.bindings import WatchMaker
from comet_ds.experts.structure import ModuleStructure
from comet_ds.experts.views import ViewDict, place_of_row

# Largest relative L2 error between the module and the recognised form, which round in one dtype.
PROBE_TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 5e-3,
    torch.bfloat16: 2e-2,
}


def parameter_dtypes(expert: nn.Module) -> set[torch.dtype]:
    """Return the dtypes of an expert's parameters, stacked or not, without making views."""
    dtypes = set()
    for module in expert.modules():
        params = module._parameters
        if isinstance(params, ViewDict):
            dtypes |= {params.experts.stack(key).dtype for key in params.stack_keys.values()}
            params = params.plain()
        dtypes |= {param.dtype for param in params.values() if param is not None}
    return dtypes


@dataclass(frozen=True)
class ExpertMLP:
    """An expert recognised as an MLP.

    Attributes:
        up: the Linear H -> F that is multiplied, or activated in the two-matrix form.
        gate: the Linear H -> F that is activated; None in the two-matrix form.
        down: the Linear F -> H.
        activation: key of ``ACTIVATIONS``.
    """

    up: nn.Linear
    gate: nn.Linear | None
    down: nn.Linear
    activation: str

    def describe(self) -> str:
        """Return a phrase for the log line."""
        return f"{'gated ' if self.gate else ''}{self.activation} MLP"

    def form(self) -> tuple[Any, ...]:
        """Return a key; experts with equal keys can share kernels."""
        biases = [linear is not None and linear.bias is None for linear in self._linears()]
        weights = [(m.weight.shape, m.weight.dtype) for m in self._linears() if m is not None]
        return self.activation, self.gate is None, *biases, *weights

    def _linears(self) -> tuple[nn.Linear | None, ...]:
        return self.up, self.gate, self.down

    def __call__(self, x: Tensor) -> Tensor:
        """Compute the recognised form on [..., H]."""
        act = ACTIVATIONS[self.activation]
        hidden = act(self.up(x)) if self.gate is None else act(self.gate(x)) * self.up(x)
        return self.down(hidden)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def recognise_mlp(expert: nn.Module) -> ExpertMLP | str:
    """Recognise what an expert computes.

    Args:
        expert: any module.

    Returns:
        The MLP, or a phrase with the reason why it is not one: a module or operation outside the
        two forms (for example dropout with p > 0 or normalisation), a subclass of nn.Linear, hooks,
        parametrizations, shared matrices, a tuple as output, or a probe that disagrees.
    """
    if not ModuleStructure([expert]).is_plain():
        return "it has hooks or a patched forward"
    if any(parametrize.is_parametrized(module) for module in expert.modules()):
        return "it has parametrizations"
    try:
        mlp = _Matcher(expert).match()
        _check_probe(mlp, expert)
    except _Unrecognised as reason:
        return str(reason)
    except Exception as error:  # tracing and probing run arbitrary user code
        return f"it cannot be traced ({type(error).__name__})"
    return mlp


class RecognisedExperts:
    """Recognises the experts of a layer; caches the result until a module changes."""

    def __init__(self) -> None:
        # One entry for train and one for eval mode.
        self._cache: dict[bool, tuple[ModuleStructure, list[ExpertMLP] | str]] = {}

    def __reduce__(self) -> tuple[type, tuple]:
        """Empty the cache of copies: it refers to the original modules' dictionaries."""
        return RecognisedExperts, ()

    def find(
        self, experts: Sequence[nn.Module], watch: WatchMaker | None = None
    ) -> list[ExpertMLP] | str:
        """Return the experts as MLPs of one form.

        Args:
            experts: the modules.
            watch: see ``ModuleStructure``.

        Returns:
            The MLPs, or a phrase with the reason why there are none. The same object until a module
            changes.
        """
        mode = next(iter(experts)).training
        if mode in self._cache and self._cache[mode][0].holds(experts):
            return self._cache[mode][1]
        self._cache[mode] = ModuleStructure(experts, watch), self._recognise(experts)
        return self._cache[mode][1]

    @staticmethod
    def _recognise(experts: Sequence[nn.Module]) -> list[ExpertMLP] | str:
        found: list[ExpertMLP] = []
        for expert in experts:
            mlp = recognise_mlp(expert)
            if isinstance(mlp, str):
                return f"not a recognised MLP: {mlp}"
            found.append(mlp)
        if len({mlp.form() for mlp in found}) > 1:
            return "the experts differ in form"
        return found


class _Unrecognised(Exception):
    """The reason why a module is not a recognised MLP."""


class _Matcher:
    """Matches a traced module against the two forms; every node must belong to the match."""

    def __init__(self, expert: nn.Module) -> None:
        self.expert = expert
        self.modules = dict(expert.named_modules())
        self.graph = fx.Tracer().trace(expert)
        self.seen: set[fx.Node] = set()

    def match(self) -> ExpertMLP:
        inputs = [n for n in self.graph.nodes if n.op == "placeholder"]
        output = next(n for n in self.graph.nodes if n.op == "output")
        if not isinstance(output.args[0], fx.Node):
            raise _Unrecognised(f"it returns a {type(output.args[0]).__name__}")
        self.seen.update((output, inputs[0]))
        down, hidden = self._linear(output.args[0])
        hidden = self._skip_identity(hidden)
        gate = None
        if self._is_product(hidden):
            activation, gate, up = self._gated(hidden, inputs[0])
        else:
            found = self._activation(hidden)
            if found is None:
                raise _Unrecognised(f"{self._name(hidden)} where an activation is expected")
            activation, up = found[0], self._linear_of(found[1], inputs[0])
        # A node outside the match may still change a tensor in place.
        if strays := [n for n in self.graph.nodes if n not in self.seen]:
            raise _Unrecognised(f"{self._name(strays[0])} outside the MLP")
        matrices = [m for m in (up, gate, down) if m is not None]
        if len({_identity(m) for m in matrices}) < len(matrices):
            raise _Unrecognised("two of its matrices share a parameter")
        num_parameters = sum(1 + (m.bias is not None) for m in matrices)
        if len(list(self.expert.parameters())) != num_parameters:
            raise _Unrecognised("it has parameters outside its matrices")
        return ExpertMLP(up, gate, down, activation)

    def _gated(self, product: fx.Node, source: fx.Node) -> tuple[str, nn.Linear, nn.Linear]:
        factors = [self._skip_identity(f) for f in product.args if isinstance(f, fx.Node)]
        if len(factors) != 2 or product.kwargs:
            raise _Unrecognised("a product of something other than two results")
        first, second = (self._activation(f) for f in factors)
        if first is not None and second is None:
            (activation, gated), other = first, factors[1]
        elif second is not None and first is None:
            (activation, gated), other = second, factors[0]
        else:
            raise _Unrecognised("a product that is not activation times linear")
        return activation, self._linear_of(gated, source), self._linear_of(other, source)

    def _linear(self, node: fx.Node) -> tuple[nn.Linear, fx.Node]:
        node = self._skip_identity(node)
        module = self.modules.get(str(node.target)) if node.op == "call_module" else None
        argument = self._argument(node)
        if (
            type(module) is nn.Linear
            and (place_of_row(module, "weight") is not None or type(module.weight) is nn.Parameter)
            and argument is not None
        ):
            self.seen.add(node)
            return module, argument
        raise _Unrecognised(f"{self._name(node)} where a Linear is expected")

    def _linear_of(self, node: fx.Node, source: fx.Node) -> nn.Linear:
        module, argument = self._linear(node)
        if self._skip_identity(argument) is not source:
            raise _Unrecognised("one more Linear than the two or three of an MLP")
        return module

    def _activation(self, node: fx.Node) -> tuple[str, fx.Node] | None:
        """Return the activation's key and its input, None if the node is no activation."""
        name = None
        if (argument := self._argument(node, "approximate", "inplace")) is None:
            return None
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            if type(module) is nn.GELU:
                name = {"none": "gelu", "tanh": "gelu_tanh"}[module.approximate]
            else:
                name = {nn.ReLU: "relu", nn.SiLU: "silu"}.get(type(module))
        elif node.op == "call_function" and node.target is F.gelu:
            name = "gelu_tanh" if node.kwargs.get("approximate", "none") == "tanh" else "gelu"
        elif node.op == "call_function":
            name = {F.relu: "relu", torch.relu: "relu", F.silu: "silu"}.get(node.target)
        elif node.op == "call_method" and node.target == "relu":
            name = "relu"
        if name is None:
            return None
        self.seen.add(node)
        return name, self._skip_identity(argument)

    def _is_product(self, node: fx.Node) -> bool:
        by_function = node.op == "call_function" and node.target in (operator.mul, torch.mul)
        if is_product := by_function or (node.op == "call_method" and node.target == "mul"):
            self.seen.add(node)
        return is_product

    def _skip_identity(self, node: fx.Node) -> fx.Node:
        while node.op == "call_module" and (argument := self._argument(node)) is not None:
            module = self.modules[str(node.target)]
            if not (type(module) is nn.Identity or (type(module) is nn.Dropout and module.p == 0)):
                break
            self.seen.add(node)
            node = argument
        return node

    @staticmethod
    def _argument(node: fx.Node, *keywords: str) -> fx.Node | None:
        """Return what an operation takes; None where that is not one result and some keywords."""
        first = node.args[0] if len(node.args) == 1 else None
        return first if isinstance(first, fx.Node) and set(node.kwargs) <= set(keywords) else None

    def _name(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return type(self.modules[str(node.target)]).__name__
        return str(getattr(node.target, "__name__", node.target))


def _identity(module: nn.Linear) -> Any:
    """Return a key that two modules have in common exactly if they share their matrix."""
    return place_of_row(module, "weight") or id(module.weight)


def _check_probe(mlp: ExpertMLP, expert: nn.Module) -> None:
    """Compare the recognised form with the module on 4 rows; draws no random numbers."""
    weight = mlp.up.weight
    count = 4 * mlp.up.in_features
    probe = torch.sin(torch.arange(count, device=weight.device) * 0.7).to(weight.dtype)
    probe = probe.view(1, 1, 4, -1)
    with torch.no_grad():
        expected, got = expert(probe).double(), mlp(probe).double()
    error = torch.linalg.vector_norm(got - expected)
    if not error <= PROBE_TOLERANCE.get(weight.dtype, 0) * torch.linalg.vector_norm(expected):
        raise _Unrecognised("the recognised form disagrees with the module on a probe")
