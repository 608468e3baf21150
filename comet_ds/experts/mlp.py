# SPDX-License-Identifier: Apache-2.0
"""The user's experts: recognising an MLP.

Experts stay the user's own modules. A module is recognised as an MLP by
what it computes, never by its class name: it is traced, the graph must be one of

    down(act(up(x)))                 two-matrix MLP
    down(act(gate(x)) * up(x))       gated MLP

and the recognised form must reproduce the module on a probe input.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from comet_ds.experts.views import RowDict, place_of_row

# Relative L2 error between the module and the recognised form: both round in the same dtype.
PROBE_TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 5e-3,
    torch.bfloat16: 2e-2,
}


def parameter_dtypes(expert: nn.Module) -> set[torch.dtype]:
    """Return the dtypes of an expert's parameters, stacked ones too."""
    dtypes = set()
    for module in expert.modules():
        own = module._parameters
        if isinstance(own, RowDict):
            dtypes |= {own.experts.stack(key).dtype for key in own.keys_of_rows.values()}
            own = own.plain()
        dtypes |= {param.dtype for param in own.values() if param is not None}
    return dtypes


@dataclass(frozen=True)
class ExpertMLP:
    """An expert recognised as an MLP.

    Attributes:
        up: H -> F.
        gate: H -> F, or None for the two-matrix form.
        down: F -> H.
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
        """Return what experts must have in common to share kernels."""
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


class ModuleStructure:
    """Module trees, cheap to compare with later.

    Remembered is what can change what recognised modules compute: their children, hooks, patched
    forwards, also of their classes, train or eval mode, dropout probabilities.

    Args:
        roots: of the trees.
        watch: ``ModuleWatch`` of csrc/autograd/module_watch.cpp, which makes the same comparison
            several times faster (64 experts of 4 modules on a slow host take 160 us here); None
            without kernels.
    """

    def __init__(self, roots: Sequence[nn.Module], watch: type | None = None) -> None:
        self.roots = list(roots)
        modules = [m for root in self.roots for m in root.modules()]
        self._attributes = [m.__dict__ for m in modules]
        self._hooks = [
            a[name]
            for a in self._attributes
            for name in (
                "_forward_hooks",
                "_forward_pre_hooks",
                "_backward_hooks",
                "_backward_pre_hooks",
            )
        ]
        # Comparing these compares modules by identity, in C.
        self._children = [m._modules for m in modules]
        self._children_then = [dict(children) for children in self._children]
        self._forwards_then = {cls: cls.forward for cls in set(map(type, modules))}
        self._training_then = [m.training for m in modules]
        self._dropouts = [a for a in self._attributes if "p" in a]
        self._p_then = [a["p"] for a in self._dropouts]
        self._was_plain = self.is_plain()
        self._watch = watch(self._attributes) if watch is not None and self._was_plain else None

    def is_plain(self) -> bool:
        """Whether no module has hooks or a patched forward."""
        is_patched = map(operator.contains, self._attributes, itertools.repeat("forward"))
        return not any(self._hooks) and not any(is_patched)

    def holds(self, roots: Sequence[nn.Module]) -> bool:
        """Whether ``roots`` are the modules seen then, unchanged."""
        if self.roots != list(roots):
            return False
        if any(cls.forward is not forward for cls, forward in self._forwards_then.items()):
            return False
        if self._watch is not None:
            return self._watch.is_unchanged()
        return (
            self.is_plain() == self._was_plain
            and self._children == self._children_then
            and list(map(_TRAINING, self._attributes)) == self._training_then
            and [a["p"] for a in self._dropouts] == self._p_then
        )


_TRAINING = operator.itemgetter("training")


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
        The MLP, or a phrase saying why it is not one: a module or operation outside the two
        forms (dropout with p > 0 and normalisation among them), a subclass of nn.Linear, hooks,
        parametrizations, shared matrices, a tuple result, or a probe that disagrees.
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
    except Exception as error:  # a module may do anything while it is traced or probed
        return f"it cannot be traced ({type(error).__name__})"
    return mlp


class RecognisedExperts:
    """The experts of a layer as MLPs of one form, remembered as long as they do not change."""

    def __init__(self) -> None:
        # By train or eval mode.
        self._found: dict[bool, tuple[ModuleStructure, list[ExpertMLP] | str]] = {}

    def __reduce__(self) -> tuple[type, tuple]:
        """Forget in copies: what is remembered are other modules' dictionaries."""
        return RecognisedExperts, ()

    def find(
        self, experts: Sequence[nn.Module], watch: type | None = None
    ) -> list[ExpertMLP] | str:
        """Return the MLPs or why there are none; the same object as long as nothing changes.

        Args:
            experts: the modules.
            watch: see ``ModuleStructure``.
        """
        mode = next(iter(experts)).training
        if mode in self._found and self._found[mode][0].holds(experts):
            return self._found[mode][1]
        self._found[mode] = ModuleStructure(experts, watch), self._recognise(experts)
        return self._found[mode][1]

    @staticmethod
    def _recognise(experts: Sequence[nn.Module]) -> list[ExpertMLP] | str:
        found = [recognise_mlp(expert) for expert in experts]
        for mlp in found:
            if isinstance(mlp, str):
                return f"not a recognised MLP: {mlp}"
        if len({mlp.form() for mlp in found}) > 1:
            return "the experts differ in form"
        return found


class _Unrecognised(Exception):
    """Why a module is not a recognised MLP."""


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
        # A node outside the match may still act, in place.
        if strays := [n for n in self.graph.nodes if n not in self.seen]:
            raise _Unrecognised(f"{self._name(strays[0])} beside the MLP")
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
            raise _Unrecognised("a product of something else than two results")
        found = [self._activation(f) for f in factors]
        if (found[0] is None) == (found[1] is None):
            raise _Unrecognised("a product that is not activation times linear")
        act = 0 if found[0] else 1
        activation, gated = found[act]
        gate, up = self._linear_of(gated, source), self._linear_of(factors[1 - act], source)
        return activation, gate, up

    def _linear(self, node: fx.Node) -> tuple[nn.Linear, fx.Node]:
        node = self._skip_identity(node)
        module = self.modules.get(node.target) if node.op == "call_module" else None
        has_plain_weight = type(module) is nn.Linear and (
            place_of_row(module, "weight") is not None or type(module.weight) is nn.Parameter
        )
        if not has_plain_weight or not self._is_unary(node):
            raise _Unrecognised(f"{self._name(node)} where a Linear is expected")
        self.seen.add(node)
        return module, node.args[0]

    def _linear_of(self, node: fx.Node, source: fx.Node) -> nn.Linear:
        module, argument = self._linear(node)
        if self._skip_identity(argument) is not source:
            raise _Unrecognised("a matrix more than its two or three")
        return module

    def _activation(self, node: fx.Node) -> tuple[str, fx.Node] | None:
        """Return the activation's key and its input, or None where the node is something else."""
        name = None
        if not self._is_unary(node, "approximate", "inplace"):
            return None
        if node.op == "call_module":
            module = self.modules[node.target]
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
        return name, self._skip_identity(node.args[0])

    def _is_product(self, node: fx.Node) -> bool:
        by_function = node.op == "call_function" and node.target in (operator.mul, torch.mul)
        if is_product := by_function or (node.op == "call_method" and node.target == "mul"):
            self.seen.add(node)
        return is_product

    def _skip_identity(self, node: fx.Node) -> fx.Node:
        while node.op == "call_module" and self._is_unary(node):
            module = self.modules[node.target]
            if not (type(module) is nn.Identity or (type(module) is nn.Dropout and module.p == 0)):
                break
            self.seen.add(node)
            node = node.args[0]
        return node

    @staticmethod
    def _is_unary(node: fx.Node, *keywords: str) -> bool:
        alone = len(node.args) == 1 and isinstance(node.args[0], fx.Node)
        return alone and set(node.kwargs) <= set(keywords)

    def _name(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return type(self.modules[node.target]).__name__
        return str(getattr(node.target, "__name__", node.target))


def _identity(module: nn.Linear) -> Any:
    """Return what two modules have in common where they share their matrix."""
    return place_of_row(module, "weight") or id(module.weight)


def _check_probe(mlp: ExpertMLP, expert: nn.Module) -> None:
    """Compare the recognised form with the module on 4 rows; draws no random number."""
    weight = mlp.up.weight
    count = 4 * mlp.up.in_features
    probe = torch.sin(torch.arange(count, device=weight.device) * 0.7).to(weight.dtype)
    probe = probe.view(1, 1, 4, -1)
    with torch.no_grad():
        expected, got = expert(probe).double(), mlp(probe).double()
    error = torch.linalg.vector_norm(got - expected)
    if not error <= PROBE_TOLERANCE.get(weight.dtype, 0) * torch.linalg.vector_norm(expected):
        raise _Unrecognised("the recognised form disagrees with the module on a probe")
