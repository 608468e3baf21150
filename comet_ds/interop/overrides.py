# SPDX-License-Identifier: Apache-2.0
"""What a user put in the place of a layer's gate, its experts, or functions of DeepSpeed.

A replaced, subclassed, patched or hooked gate or ``Experts`` is called as DeepSpeed calls it, and
the layer goes on with what it returns:

    gate       (x [T, H], used_token, True, use_tutel) -> l_aux, capacity, num_experts,
               indices [K, T] (-1 = dropped), locations, gates [K, T], exp_counts
    experts    [W, El, C, H] -> [W, El, C, H]

W is the number of ranks of the expert parallel group, El of local experts, C of rows that one
expert has of one rank at most; slots without a row are zero. Where functions are patched that the
gate calls, the gate is DeepSpeed's; where they are the layer's, all of the layer is.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from deepspeed.moe import experts as deepspeed_experts
from deepspeed.moe import layer as deepspeed_layer
from deepspeed.moe import mappings, sharded_moe
from torch import Tensor, nn

from comet_ds.gate.routing import Routing
from comet_ds.gate.topk_gate import TopKGate

# Of sharded_moe. ``gumbel_rsample`` and ``multiplicative_jitter`` are not among them: ``gate.py``
# calls those that stand there.
GATE_FUNCTIONS = (
    "top1gating",
    "top2gating",
    "topkgating",
    "einsum",
    "_capacity",
    "_stack_routes",
    "_top_idx",  # DeepSpeed 0.19.6, as the next
    "_one_hot_to_float",
)
LAYER_FUNCTIONS = (
    "_AllToAll",
    "_route_slots",
    "_sparse_encode",
    "_sparse_decode",
    "drop_tokens",
    "gather_tokens",
)
FILES = {module.__file__ for module in (sharded_moe, mappings, deepspeed_experts)}


class Overrides(NamedTuple):
    """What runs otherwise than by this package; each a phrase that names it, None where nothing.

    Attributes:
        gate: the gate is to be called as a module.
        is_gate_own: that is because of hooks alone, and the gate decides by this package's code.
        experts: ``Experts`` is to be called as a module.
        layer: DeepSpeed's forward is to run.
        hooks: there are hooks on all modules, so no module may be skipped.
    """

    gate: str | None = None
    is_gate_own: bool = True
    experts: str | None = None
    layer: str | None = None
    hooks: str | None = None

    def why_not_fused(self) -> str | None:
        """Return the first of them."""
        return self.layer or self.gate or self.experts or self.hooks

    def describe(self) -> str:
        """Return what to add to the line of the log that says which path runs."""
        found = [what for what in (self.gate, self.experts) if what is not None]
        return "".join(f"; {what}, called as DeepSpeed does" for what in found)


NONE = Overrides()


def find_overrides(gate: nn.Module, experts: nn.Module) -> Overrides:
    """Return what a layer must not run by this package's code; a few microseconds."""
    patched = _functions.find()
    is_hooked = any(_GLOBAL_HOOKS)
    if (
        patched is _NOTHING
        and not is_hooked
        and type(gate) is TopKGate
        and _is_plain(gate)
        and type(experts).forward is _functions.experts_forward
        and _is_plain(experts)
    ):
        return NONE
    hooks = "there are hooks on all modules" if is_hooked else None
    own = _why_gate(gate, patched.gate)
    of_experts = _why_experts(experts) or (hooks and f"{hooks}, Experts among them")
    if own is None and (is_hooked or _has_hooks(gate)):
        what = f"{hooks}, the gate among them" if is_hooked else "the gate has hooks"
        return Overrides(what, True, of_experts, patched.layer, hooks)
    return Overrides(own, own is None, of_experts, patched.layer, hooks)


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
    if type(experts).forward is not _functions.experts_forward:
        is_subclass = isinstance(experts, deepspeed_experts.Experts)
        if is_subclass and type(experts).forward is deepspeed_experts.Experts.forward:
            return "deepspeed.moe.experts.Experts.forward is patched"
        return f"Experts is a {name}"
    return "Experts has hooks" if _has_hooks(experts) else None


def _full_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _is_plain(module: nn.Module) -> bool:
    return "forward" not in module.__dict__ and not _has_hooks(module)


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


# Hooks on all modules, such as torch.utils.flop_counter's.
_GLOBAL_HOOKS = (
    torch.nn.modules.module._global_forward_hooks,
    torch.nn.modules.module._global_forward_pre_hooks,
    torch.nn.modules.module._global_backward_hooks,
    torch.nn.modules.module._global_backward_pre_hooks,
)


def has_hooks_on_all_modules() -> bool:
    """Return whether a hook is registered on all modules of the process."""
    return any(_GLOBAL_HOOKS)


class _Patched(NamedTuple):
    gate: str | None
    layer: str | None


_NOTHING = _Patched(None, None)


class _Functions:
    """DeepSpeed's functions and forwards, as they are when comet_ds is imported.

    One that is somebody else's already then counts as patched: its code is in another file.
    """

    def __init__(self) -> None:
        names = (*GATE_FUNCTIONS, *LAYER_FUNCTIONS)
        self._names = [name for name in names if hasattr(sharded_moe, name)]
        self._get = operator.itemgetter(*self._names)
        self._then = tuple(
            value if _is_deepspeeds(value) else None for value in self._get(vars(sharded_moe))
        )
        self.experts_forward = _if_deepspeeds(deepspeed_experts.Experts.forward)
        self._gate_forward = _if_deepspeeds(sharded_moe.TopKGate.forward)
        self._layer_forward = _if_deepspeeds(sharded_moe.MOELayer.forward)

    def find(self) -> _Patched:
        """Return what is patched now."""
        now = self._get(vars(sharded_moe))
        if (
            now == self._then
            and sharded_moe.TopKGate.forward is self._gate_forward
            and sharded_moe.MOELayer.forward is self._layer_forward
        ):
            return _NOTHING
        changed = [n for n, a, b in zip(self._names, now, self._then, strict=True) if a is not b]
        of_gate = [name for name in changed if name in GATE_FUNCTIONS]
        of_layer = [name for name in changed if name in LAYER_FUNCTIONS]
        if sharded_moe.TopKGate.forward is not self._gate_forward:
            of_gate.append("TopKGate.forward")
        if sharded_moe.MOELayer.forward is not self._layer_forward:
            of_layer.append("MOELayer.forward")
        return _Patched(_say_patched(of_gate), _say_patched(of_layer))


def _say_patched(names: list[str]) -> str | None:
    listed = ", ".join(f"deepspeed.moe.sharded_moe.{name}" for name in names)
    return f"{listed} {'is' if len(names) == 1 else 'are'} patched" if names else None


def _is_deepspeeds(value: Any) -> bool:
    """Whether a function, or a class and its methods, is from DeepSpeed's files."""
    if isinstance(value, type):
        methods = [m.__func__ for m in vars(value).values() if isinstance(m, staticmethod)]
        is_named = value.__module__ == sharded_moe.__name__
        return is_named and all(map(_is_deepspeeds, methods))
    value = getattr(value, "_torchdynamo_orig_callable", value)  # DeepSpeed 0.19.6 compiles some
    code = getattr(value, "__code__", None)
    return code is None or code.co_filename in FILES


def _if_deepspeeds(forward: Any) -> Any:
    return forward if _is_deepspeeds(forward) else None


_functions = _Functions()


# ---- construction ------------------------------------------------------------------------------


def class_for(name: str, own: type) -> type:
    """Return the class to build a layer's gate or experts of: what the user put there, or ours.

    Args:
        name: "TopKGate", "Experts" or "MOELayer", in ``deepspeed.moe.layer``.
        own: this package's class.

    Raises:
        ValueError: MOELayer was replaced.
    """
    found, stock = getattr(deepspeed_layer, name), _CLASSES[name]
    if found is stock or issubclass(own, found):
        return own
    if name == "MOELayer":
        raise ValueError(
            f"deepspeed.moe.layer.MOELayer must be DeepSpeed's, got {found.__module__}."
            f"{found.__qualname__}: comet_ds.MoE is a layer of its own; change its gate or its "
            "experts instead, or build deepspeed.moe.layer.MoE"
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
        gate: any module that answers as ``sharded_moe.TopKGate`` does.
        found: what ``find_overrides`` has found.
        x: [T, H].
        used_token: handed on.
        use_tutel: handed on.
        num_experts: E of the layer.

    Returns:
        The routing, and ``l_aux`` as the gate returned it.

    Raises:
        ValueError: the gate returns something else.
    """
    with routing_by_itself(gate) if found.is_gate_own else _nothing():
        answer = gate(x, used_token, True, use_tutel)
    name = type(gate).__name__
    if not isinstance(answer, tuple | list) or len(answer) != 7:
        got = type(answer).__name__
        got = f"{len(answer)} values" if isinstance(answer, tuple | list) else f"a {got}"
        raise ValueError(
            f"the gate, a {name}, must return DeepSpeed's 7 values (l_aux, capacity, num_experts, "
            "indices, locations, gates, exp_counts) when it is called with (input, used_token, "
            f"True, use_tutel), got {got}"
        )
    l_aux, _, of_experts, indices, _, weights, exp_counts = answer
    num_tokens = x.shape[0]
    if indices.dim() != 2 or indices.shape[1] != num_tokens or indices.shape != weights.shape:
        raise ValueError(
            f"the gate, a {name}, must return indices and gates of shape [routes, {num_tokens}], "
            f"got {list(indices.shape)} and {list(weights.shape)}"
        )
    if int(of_experts) != num_experts:
        raise ValueError(
            f"the gate, a {name}, must route to the layer's {num_experts} experts, "
            f"got {int(of_experts)}"
        )
    ids = indices.t().long()
    if ids.numel() and int(ids.max()) >= num_experts:
        raise ValueError(
            f"the gate, a {name}, must return indices below {num_experts}, got {int(ids.max())}"
        )
    as_tensor = functools.partial(torch.as_tensor, dtype=torch.float32, device=x.device)
    return (
        Routing(
            topk_ids=ids.clamp(min=-1).contiguous(),
            topk_weights=weights.t().float(),
            l_aux=l_aux if isinstance(l_aux, Tensor) else as_tensor(l_aux or 0.0),
            exp_counts=exp_counts,
        ),
        l_aux,
    )


@contextmanager
def routing_by_itself(gate: TopKGate) -> Iterator[None]:
    """While a gate with hooks is called: its forward answers by ``route``."""
    gate.__dict__["is_in_layer"] = True
    try:
        yield
    finally:
        del gate.__dict__["is_in_layer"]


@contextmanager
def _nothing() -> Iterator[None]:
    yield
