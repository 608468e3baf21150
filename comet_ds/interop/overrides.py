# SPDX-License-Identifier: Apache-2.0
"""Detecting and calling user code that overrides a layer's gate, its experts or DeepSpeed.

A gate or ``Experts`` that was replaced, subclassed, patched or hooked is called as DeepSpeed calls
it, and the layer uses its result:

    gate       (x [T, H], used_token, True, use_tutel) -> l_aux, capacity, num_experts,
               indices [K, T] (-1 = dropped), locations, gates [K, T], exp_counts
    experts    [W, El, C, H] -> [W, El, C, H]

W is the number of ranks of the expert parallel group and El the number of local experts. C is the
largest number of rows of one expert from one rank; slots without a row are zero. If functions that
DeepSpeed's gate calls are patched, DeepSpeed's gate runs; if functions that its layer calls are
patched, DeepSpeed's whole layer runs.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from deepspeed.moe import experts as deepspeed_experts
from deepspeed.moe import layer as deepspeed_layer
from deepspeed.moe import mappings, sharded_moe
from torch import Tensor, nn

from comet_ds._compat.torch import GLOBAL_HOOKS, has_hooks, uncompiled
from comet_ds.gate.routing import Routing
from comet_ds.gate.topk_gate import TopKGate

# Functions of deepspeed.moe.sharded_moe. ``gumbel_rsample`` and ``multiplicative_jitter`` need no
# check: this package's gate calls them through that module, patched or not.
GATE_FUNCTIONS = (
    "top1gating",
    "top2gating",
    "topkgating",
    "einsum",
    "_capacity",
    "_stack_routes",
    "_top_idx",  # only in DeepSpeed 0.19.6
    "_one_hot_to_float",  # only in DeepSpeed 0.19.6
)
LAYER_FUNCTIONS = (
    "_AllToAll",
    "_route_slots",
    "_sparse_encode",
    "_sparse_decode",
    "drop_tokens",
    "gather_tokens",
)
FILES = frozenset(module.__file__ for module in (sharded_moe, mappings, deepspeed_experts))


class Overrides(NamedTuple):
    """Which parts of a layer must run other code than this package's.

    Attributes are phrases that name the override, None if there is none.

    Attributes:
        gate: why the gate must be called as a module.
        is_gate_own: whether hooks are the only reason, so that this package's gate still routes.
        experts: why ``Experts`` must be called as a module.
        layer: why DeepSpeed's forward must run.
        hooks: that there are hooks on all modules, so no module may be skipped.
    """

    gate: str | None = None
    is_gate_own: bool = True
    experts: str | None = None
    layer: str | None = None
    hooks: str | None = None

    def why_not_fused(self) -> str | None:
        """Return the first override, which excludes the fused path; None if there is none."""
        return self.layer or self.gate or self.experts or self.hooks

    def describe(self) -> str:
        """Return the part of the log line about a gate or ``Experts`` called as modules."""
        called = [why for why in (self.gate, self.experts) if why is not None]
        return "".join(f"; {why}, called as DeepSpeed does" for why in called)


NONE = Overrides()


def find_overrides(gate: nn.Module, experts: nn.Module) -> Overrides:
    """Return a layer's overrides; takes a few microseconds if there are none.

    Args:
        gate: the layer's gate.
        experts: the layer's ``Experts``.
    """
    patched = _deepspeed_code.find_patches()
    is_hooked = any(GLOBAL_HOOKS)
    if (
        patched is _NO_PATCHES
        and not is_hooked
        and type(gate) is TopKGate
        and _is_plain(gate)
        and type(experts).forward is _deepspeed_code.experts_forward
        and _is_plain(experts)
    ):
        return NONE
    hooks = "there are hooks on all modules" if is_hooked else None
    why_gate = _why_gate(gate, patched.gate)
    why_experts = _why_experts(experts) or (hooks and f"{hooks}, Experts among them")
    if why_gate is None and (is_hooked or has_hooks(gate)):
        why_gate = f"{hooks}, the gate among them" if is_hooked else "the gate has hooks"
        return Overrides(why_gate, True, why_experts, patched.layer, hooks)
    return Overrides(why_gate, why_gate is None, why_experts, patched.layer, hooks)


def _why_gate(gate: nn.Module, patched: str | None) -> str | None:
    if "forward" in gate.__dict__:
        return f"the forward of the gate, a {type(gate).__name__}, is patched"
    if not isinstance(gate, TopKGate) or type(gate).forward is not TopKGate.forward:
        return f"the gate is a {_full_name(gate)}"
    return patched


def _why_experts(experts: nn.Module) -> str | None:
    name = _full_name(experts)
    if "forward" in experts.__dict__:
        return f"the forward of the experts' {type(experts).__name__} is patched"
    if type(experts).forward is not _deepspeed_code.experts_forward:
        is_subclass = isinstance(experts, deepspeed_experts.Experts)
        if is_subclass and type(experts).forward is deepspeed_experts.Experts.forward:
            return "deepspeed.moe.experts.Experts.forward is patched"
        return f"Experts is a {name}"
    return "Experts has hooks" if has_hooks(experts) else None


def _full_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _is_plain(module: nn.Module) -> bool:
    return "forward" not in module.__dict__ and not has_hooks(module)


def has_hooks_on_all_modules() -> bool:
    """Return whether a hook is registered on all modules of the process."""
    return any(GLOBAL_HOOKS)


class _Patches(NamedTuple):
    """Phrases that name patched functions of DeepSpeed's gate and of its layer, None for none."""

    gate: str | None
    layer: str | None


_NO_PATCHES = _Patches(None, None)


class _DeepSpeedCode:
    """A snapshot, taken when comet_ds is imported, of DeepSpeed's functions and forwards.

    A function that was patched before counts as patched too: its code is in another file.
    """

    def __init__(self) -> None:
        names = (*GATE_FUNCTIONS, *LAYER_FUNCTIONS)
        self._names = [name for name in names if hasattr(sharded_moe, name)]
        self._get = operator.itemgetter(*self._names)
        self._originals = tuple(map(_original_or_none, self._get(vars(sharded_moe))))
        self.experts_forward = _original_or_none(deepspeed_experts.Experts.forward)
        self._gate_forward = _original_or_none(sharded_moe.TopKGate.forward)
        self._layer_forward = _original_or_none(sharded_moe.MOELayer.forward)

    def find_patches(self) -> _Patches:
        """Compare DeepSpeed's present code with the snapshot."""
        current = self._get(vars(sharded_moe))
        if (
            current == self._originals
            and sharded_moe.TopKGate.forward is self._gate_forward
            and sharded_moe.MOELayer.forward is self._layer_forward
        ):
            return _NO_PATCHES
        pairs = zip(self._names, current, self._originals, strict=True)
        patched = [name for name, value, original in pairs if value is not original]
        gate_names = [name for name in patched if name in GATE_FUNCTIONS]
        layer_names = [name for name in patched if name in LAYER_FUNCTIONS]
        if sharded_moe.TopKGate.forward is not self._gate_forward:
            gate_names.append("TopKGate.forward")
        if sharded_moe.MOELayer.forward is not self._layer_forward:
            layer_names.append("MOELayer.forward")
        return _Patches(_describe_patched(gate_names), _describe_patched(layer_names))


def _describe_patched(names: list[str]) -> str | None:
    listed = ", ".join(f"deepspeed.moe.sharded_moe.{name}" for name in names)
    return f"{listed} {'is' if len(names) == 1 else 'are'} patched" if names else None


def _is_deepspeeds(value: Any) -> bool:
    """Return whether a function, or a class with its methods, is from DeepSpeed's files."""
    if isinstance(value, type):
        methods = [m.__func__ for m in vars(value).values() if isinstance(m, staticmethod)]
        is_named = value.__module__ == sharded_moe.__name__
        return is_named and all(map(_is_deepspeeds, methods))
    value = uncompiled(value)  # DeepSpeed 0.19.6 compiles some
    code = getattr(value, "__code__", None)
    return code is None or code.co_filename in FILES


def _original_or_none(value: Any) -> Any:
    """Return DeepSpeed's function or class; None, which equals nothing, for a patched one."""
    return value if _is_deepspeeds(value) else None


_deepspeed_code = _DeepSpeedCode()


# ---- construction ------------------------------------------------------------------------------


def class_for(name: str, own: type) -> type:
    """Return the class for a layer's gate, experts or MOELayer: the user's replacement or ours.

    Args:
        name: "TopKGate", "Experts" or "MOELayer", in ``deepspeed.moe.layer``.
        own: this package's class.

    Raises:
        ValueError: MOELayer was replaced, which this package does not support.
    """
    found, stock = getattr(deepspeed_layer, name), _CLASSES[name]
    if found is stock or issubclass(own, found):
        return own
    if name == "MOELayer":
        raise ValueError(
            f"deepspeed.moe.layer.MOELayer must be DeepSpeed's, got {found.__module__}."
            f"{found.__qualname__}: comet_ds.MoE has a MOELayer of its own; replace its gate or "
            "its experts instead, or build deepspeed.moe.layer.MoE"
        )
    return found


_CLASSES = {
    "TopKGate": sharded_moe.TopKGate,
    "Experts": deepspeed_experts.Experts,
    "MOELayer": sharded_moe.MOELayer,
}


# ---- the gate ----------------------------------------------------------------------------------


def call_gate(
    gate: nn.Module,
    found: Overrides,
    x: Tensor,
    used_token: Tensor | None,
    use_tutel: bool,
    num_experts: int,
) -> tuple[Routing, Any]:
    """Call a gate as DeepSpeed's layer does.

    Args:
        gate: a module with the interface of ``sharded_moe.TopKGate``.
        found: the result of ``find_overrides``.
        x: [T, H].
        used_token: passed to the gate.
        use_tutel: passed to the gate.
        num_experts: number of experts of the layer, E.

    Returns:
        The routing, and ``l_aux`` as the gate returned it.

    Raises:
        ValueError: the gate's result is not what DeepSpeed's layer expects.
    """
    with _routing_in_forward(gate) if found.is_gate_own else nullcontext():
        result = gate(x, used_token, True, use_tutel)
    _check_gate_result(result, f"the gate, a {type(gate).__name__},", x.shape[0], num_experts)
    l_aux, _, _, indices, _, weights, exp_counts = result
    l_aux_tensor = l_aux
    if not isinstance(l_aux, Tensor):
        l_aux_tensor = torch.as_tensor(l_aux or 0.0, dtype=torch.float32, device=x.device)
    routing = Routing(
        topk_ids=indices.t().long().clamp(min=-1).contiguous(),
        topk_weights=weights.t().float(),
        l_aux=l_aux_tensor,
        exp_counts=exp_counts,
    )
    return routing, l_aux


def _check_gate_result(result: Any, gate: str, num_tokens: int, num_experts: int) -> None:
    """Raise ValueError if a gate's result is not what DeepSpeed's layer expects."""
    if not isinstance(result, tuple | list) or len(result) != 7:
        got = type(result).__name__
        got = f"{len(result)} values" if isinstance(result, tuple | list) else f"a {got}"
        raise ValueError(
            f"{gate} must return DeepSpeed's 7 values (l_aux, capacity, num_experts, "
            "indices, locations, gates, exp_counts) when it is called with (input, used_token, "
            f"True, use_tutel), got {got}"
        )
    _, _, gate_experts, indices, _, weights, _ = result
    if indices.dim() != 2 or indices.shape[1] != num_tokens or indices.shape != weights.shape:
        raise ValueError(
            f"{gate} must return indices and gates of shape [routes, {num_tokens}], "
            f"got {list(indices.shape)} and {list(weights.shape)}"
        )
    if int(gate_experts) != num_experts:
        raise ValueError(
            f"{gate} must route to the layer's {num_experts} experts, got {int(gate_experts)}"
        )
    if indices.numel() and int(indices.max()) >= num_experts:
        raise ValueError(
            f"{gate} must return indices below {num_experts}, got {int(indices.max())}"
        )


@contextmanager
def _routing_in_forward(gate: nn.Module) -> Iterator[None]:
    """Make the forward of this package's gate return the result of its ``route``."""
    gate.__dict__["is_in_layer"] = True
    try:
        yield
    finally:
        del gate.__dict__["is_in_layer"]
