# SPDX-License-Identifier: Apache-2.0
"""Hooks on DeepSpeed's engine for models with comet_ds layers.

When comet_ds is imported, these methods of ``DeepSpeedEngine`` are wrapped once. All but the first
do something only for models with ``StackedExperts``:

    _configure_distributed_model   applies the "comet_ds" block of the configuration
    _configure_optimizer           unstacks experts unless the optimizer is elementwise, records the
                                   optimizer's groups before DeepSpeed flattens them, and installs
                                   ZeRO's shortcuts for stacks (``shortcuts.py``)
    save_checkpoint                make the engine, its optimizer and its learning rate scheduler
    load_checkpoint                use DeepSpeed's layout, one parameter per expert, while they run
    save_16bit_model               saves the experts of all ranks

So checkpoints have the same files and names as those of an engine with DeepSpeed's own layers,
which can load them without comet_ds. A file of another layout is refused before any weight is
loaded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import logger

from comet_ds._compat.deepspeed import (
    CHECK_OPTIMIZER,
    CONFIGURE_MODEL,
    CONFIGURE_OPTIMIZER,
    Engine,
    json_of,
)
from comet_ds.checkpoints.whole_state import gather_experts
from comet_ds.config import CONFIG_KEY, ENGINE_OPTIONS, CometConfig, check_group_options
from comet_ds.experts.stacked import StackedExperts
from comet_ds.layer import MoE
from comet_ds.zero.engine_layout import EngineLayout, replaced
from comet_ds.zero.optimizer_choice import choose_layout, stacked_experts
from comet_ds.zero.optimizer_groups import check_groups, name_groups
from comet_ds.zero.shortcuts import install_shortcuts

# Where an engine keeps its ``EngineLayout``.
_LAYOUT = "_comet_ds_layout"


def install_hooks() -> None:
    """Wrap the engine's methods; a second call does nothing.

    Checked with DeepSpeed 0.19.6 and 0.19.8.
    """
    for name, hook in (
        (CONFIGURE_OPTIMIZER, _configure_optimizer),
        ("save_checkpoint", _use_native_layout),
        ("load_checkpoint", _use_native_layout),
        ("save_16bit_model", _save_whole_model),
    ):
        original = getattr(DeepSpeedEngine, name)
        if not hasattr(original, "_is_comet_ds"):
            setattr(DeepSpeedEngine, name, _wrap(original, hook))
    original = getattr(DeepSpeedEngine, CONFIGURE_MODEL)
    if not hasattr(original, "_is_comet_ds"):
        setattr(DeepSpeedEngine, CONFIGURE_MODEL, _with_options(original))


def _marked(method: Callable[..., Any]) -> Callable[..., Any]:
    """Note on a method that it is wrapped."""
    method.__dict__["_is_comet_ds"] = True
    return method


def _with_options(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(engine: Engine, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        _apply_options(engine, model)
        return original(engine, model, *args, **kwargs)

    return _marked(method)


def _apply_options(engine: Engine, model: torch.nn.Module) -> None:
    """Apply the "comet_ds" block, unless ``comet_ds.initialize`` has done so.

    Raises:
        ValueError: unknown key or bad value; layers of a group with different options of a group.
    """
    block = json_of(engine).get(CONFIG_KEY)
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    if block is not None and layers:
        options = CometConfig.parse(block)
        unconfigured = [layer for layer in layers if layer.json_block != options]
        for layer in unconfigured:
            layer.configure(options)
        ignored = [key for key in ENGINE_OPTIONS if key in block]
        if unconfigured and ignored:
            logger.warning(
                f'"{CONFIG_KEY}": {", ".join(ignored)} of the configuration need '
                "comet_ds.initialize in place of deepspeed.initialize, or comet_ds.attach_metrics; "
                "the rest is applied"
            )
    by_group: dict[str, list[CometConfig]] = {}
    for layer in layers:
        if layer.ep_size > 1 and layer.config is not None:
            by_group.setdefault(layer.expert_group_name, []).append(layer.config)
    check_group_options(by_group)


def _wrap(original: Callable[..., Any], hook: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(engine: Engine, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(module, StackedExperts) for module in engine.module.modules()):
            return hook(functools.partial(original, engine), engine, *args, **kwargs)
        return original(engine, *args, **kwargs)

    return _marked(method)


def _configure_optimizer(
    original: Callable[..., Any], engine: Engine, client_optimizer: Any, parameters: list
) -> None:
    client_optimizer, parameters = choose_layout(engine, client_optimizer, parameters)
    if client_optimizer is None:
        name_groups(parameters)
    check = getattr(engine, CHECK_OPTIMIZER)

    def note_groups(basic_optimizer: torch.optim.Optimizer) -> Any:
        if client_optimizer is not None:
            check_groups(engine, basic_optimizer)
        if stacked_experts(engine.module):
            engine.__dict__[_LAYOUT] = EngineLayout(engine, basic_optimizer)
        return check(basic_optimizer)

    with replaced(engine, **{CHECK_OPTIMIZER: note_groups}):
        original(client_optimizer, parameters)
    if not (found := stacked_experts(engine.module)):
        return
    install_shortcuts(engine, [s for e in found for s in e.stacks().values()])


def _use_native_layout(
    original: Callable[..., Any], engine: Engine, *args: Any, **kwargs: Any
) -> Any:
    layout = engine.__dict__.get(_LAYOUT)
    if layout is None and stacked_experts(engine.module):
        layout = EngineLayout(engine, None)
    if layout is None:
        return original(*args, **kwargs)
    with layout.in_use():
        return original(*args, **kwargs)


def _save_whole_model(
    original: Callable[..., Any], engine: Engine, *args: Any, **kwargs: Any
) -> Any:
    """Save the experts of all ranks; DeepSpeed's method saves those of rank 0 only."""
    get = engine.module_state_dict

    def get_whole(*args: Any, **kwargs: Any) -> Any:
        state_dict = get(*args, **kwargs)
        return state_dict if state_dict is None else gather_experts(engine.module, state_dict)

    with replaced(engine, module_state_dict=get_whole):
        return original(*args, **kwargs)
