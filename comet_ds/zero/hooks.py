# SPDX-License-Identifier: Apache-2.0
"""Hooks on DeepSpeed's engine, for models with stacked experts; none for others.

Four methods of ``DeepSpeedEngine`` are wrapped, once, when comet_ds is imported:

    _configure_distributed_model   applies the "comet_ds" block of the configuration
    _configure_optimizer   keeps the stacks only where the optimizer works by element, notes which
                           parameters are in which group before DeepSpeed flattens them, and spares
                           ZeRO what it need not do for stacks (``zero_shortcuts.py``)
    save_checkpoint        while it runs, the engine, its optimizer and its learning rate scheduler
    load_checkpoint        speak DeepSpeed's layout: one parameter per expert

So files are what an engine with DeepSpeed's own layers writes, and it can load them without
comet_ds. A file of another layout is refused before any weight is loaded.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.checkpoint.constants import FROZEN_PARAM_FRAGMENTS, OPTIMIZER_STATE_DICT
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups, logger

from comet_ds.checkpoints.flat_states import FlatStates
from comet_ds.checkpoints.layout import Cluster, ParameterTable, find_clusters, is_trained
from comet_ds.checkpoints.states import ParameterStates, regroup_scheduler
from comet_ds.checkpoints.whole_state import gather_experts
from comet_ds.config import CONFIG_KEY, ENGINE_OPTIONS, CometConfig, check_group_options
from comet_ds.experts.stacked import StackedExperts
from comet_ds.layer import MoE
from comet_ds.zero.optimizer_choice import choose_layout, stacked_experts
from comet_ds.zero.optimizer_groups import check_groups, name_groups
from comet_ds.zero.shortcuts import install_shortcuts


def install_hooks() -> None:
    """Wrap the engine's methods; does nothing the second time.

    Checked with DeepSpeed 0.19.6 and 0.19.8.
    """
    for name, hook in (
        ("_configure_optimizer", _configure_optimizer),
        ("save_checkpoint", _use_native_layout),
        ("load_checkpoint", _use_native_layout),
        ("save_16bit_model", _save_whole_model),
    ):
        original = getattr(DeepSpeedEngine, name)
        if not hasattr(original, "_is_comet_ds"):
            setattr(DeepSpeedEngine, name, _wrap(original, hook))
    original = DeepSpeedEngine._configure_distributed_model
    if not hasattr(original, "_is_comet_ds"):
        DeepSpeedEngine._configure_distributed_model = _with_options(original)


def _with_options(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(engine: DeepSpeedEngine, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        _apply_options(engine, model)
        return original(engine, model, *args, **kwargs)

    method._is_comet_ds = True
    return method


def _apply_options(engine: DeepSpeedEngine, model: torch.nn.Module) -> None:
    """Apply the "comet_ds" block, unless ``comet_ds.initialize`` has done so.

    Raises:
        ValueError: unknown key or bad value; layers of a group with different options of a group.
    """
    block = engine._config._param_dict.get(CONFIG_KEY)
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
    def method(engine: DeepSpeedEngine, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(module, StackedExperts) for module in engine.module.modules()):
            return hook(functools.partial(original, engine), engine, *args, **kwargs)
        return original(engine, *args, **kwargs)

    method._is_comet_ds = True
    return method


def _configure_optimizer(
    original: Callable[..., Any], engine: DeepSpeedEngine, client_optimizer: Any, parameters: list
) -> None:
    client_optimizer, parameters = choose_layout(engine, client_optimizer, parameters)
    if client_optimizer is None:
        name_groups(parameters)
    check = engine._do_optimizer_sanity_check

    def note_groups(basic_optimizer: torch.optim.Optimizer) -> Any:
        if client_optimizer is not None:
            check_groups(engine, basic_optimizer)
        if stacked_experts(engine.module):
            engine._comet_ds_layout = EngineLayout(engine, basic_optimizer)
        return check(basic_optimizer)

    with _replaced(engine, _do_optimizer_sanity_check=note_groups):
        original(client_optimizer, parameters)
    if not (found := stacked_experts(engine.module)):
        return
    install_shortcuts(engine, [s for e in found for s in e.stacks().values()])


def _use_native_layout(
    original: Callable[..., Any], engine: DeepSpeedEngine, *args: Any, **kwargs: Any
) -> Any:
    layout = getattr(engine, "_comet_ds_layout", None)
    if layout is None and stacked_experts(engine.module):
        layout = EngineLayout(engine, None)
    if layout is None:
        return original(*args, **kwargs)
    with layout.in_use():
        return original(*args, **kwargs)


def _save_whole_model(
    original: Callable[..., Any], engine: DeepSpeedEngine, *args: Any, **kwargs: Any
) -> Any:
    """Save the experts of all ranks; DeepSpeed alone saves rank 0's."""
    get = engine.module_state_dict

    def get_whole(*args: Any, **kwargs: Any) -> Any:
        state_dict = get(*args, **kwargs)
        return state_dict if state_dict is None else gather_experts(engine.module, state_dict)

    with _replaced(engine, module_state_dict=get_whole):
        return original(*args, **kwargs)


@contextlib.contextmanager
def _replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """Replace attributes of one object for a while."""
    before = {name: owner.__dict__[name] for name in attributes if name in owner.__dict__}
    owner.__dict__.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del owner.__dict__[name]
        owner.__dict__.update(before)


class EngineLayout:
    """The native layout of an engine with stacked experts.

    Args:
        engine: while it is built.
        basic_optimizer: before DeepSpeed wraps it; None without an optimizer.
    """

    def __init__(
        self, engine: DeepSpeedEngine, basic_optimizer: torch.optim.Optimizer | None
    ) -> None:
        self._engine = engine
        self._table = ParameterTable(engine.module, engine.param_names)
        self._clusters: list[Cluster] = []
        self._states: FlatStates | ParameterStates | None = None
        if basic_optimizer is not None:
            self._clusters = find_clusters(basic_optimizer.param_groups, self._table)
            is_flattened = (
                engine.zero_optimization() or engine.fp16_enabled() or engine.bfloat16_enabled()
            )
            if is_flattened:
                self._join_frozen_groups(basic_optimizer)

    def _join_frozen_groups(self, optimizer: torch.optim.Optimizer) -> None:
        """Give a group without trained parameters to its cluster's others.

        Stacks above DeepSpeed's limit are groups of their own, and DeepSpeed cannot flatten one
        that is frozen. With one parameter per expert every group has some that is trained.
        """
        kept, at = [], 0
        for number, cluster in enumerate(self._clusters):
            own = optimizer.param_groups[at : at + len(cluster.stacked)]
            at += len(own)
            trained = [g for g in own if any(is_trained(p) for p in g["params"])]
            if 0 < len(trained) < len(own):
                for group in own:
                    if not any(group is other for other in trained):
                        trained[0]["params"] += group["params"]
                stacked = [list(group["params"]) for group in trained]
                self._clusters[number] = Cluster(stacked, cluster.native)
                own = trained
            kept += own
        optimizer.param_groups[:] = kept

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Let the engine, its optimizer and its learning rate scheduler speak the native layout.

        Raises:
            RuntimeError: the model has been unstacked since the optimizer was made.
        """
        engine, optimizer = self._engine, self._engine.optimizer
        self._table.check_current()
        replaced: dict[str, Any] = {
            "_get_zero_frozen_param_attributes": self._frozen_attributes,
            "_get_shared_params": functools.partial(self._shared, engine._get_shared_params),
            "load_module_state_dict": functools.partial(
                self._load_module, engine.load_module_state_dict
            ),
        }
        with contextlib.ExitStack() as stack:
            if optimizer is not None and self._clusters:
                states = self._make_states()
                replaced["_load_checkpoint"] = functools.partial(
                    self._load_checked, engine._load_checkpoint
                )
                if isinstance(states, FlatStates):
                    replaced["_get_zero_param_shapes"] = states.param_shapes
                load = self._load_zero if engine.zero_optimization() else self._load_optimizer
                methods = {
                    "state_dict": functools.partial(self._save_optimizer, optimizer.state_dict),
                    "load_state_dict": functools.partial(load, optimizer.load_state_dict),
                }
                stack.enter_context(_replaced(optimizer, **methods))
                if engine.lr_scheduler is not None and self._has_other_groups():
                    replaced["lr_scheduler"] = self._native_scheduler(engine.lr_scheduler)
            stack.enter_context(_replaced(engine, **replaced))
            yield

    def _make_states(self) -> FlatStates | ParameterStates:
        optimizer = self._engine.optimizer
        if self._states is None:
            flat = DeepSpeedZeroOptimizer | BF16_Optimizer | FP16_Optimizer
            kind = FlatStates if isinstance(optimizer, flat) else ParameterStates
            self._states = kind(optimizer, self._clusters, self._table)
        return self._states

    # ---- the optimizer ---------------------------------------------------------------------

    def _save_optimizer(self, save: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        return self._states.to_native(save())

    def _load_optimizer(
        self, load: Callable[..., None], state_dict: Mapping[str, Any], **kwargs: Any
    ) -> None:
        load(self._states.from_native(state_dict), **kwargs)

    def _load_zero(
        self, load: Callable[..., None], state_dict_list: list[Any], **kwargs: Any
    ) -> None:
        rank = dist.get_rank(group=self._engine.optimizer.dp_process_group)
        states = list(state_dict_list)
        states[rank] = self._states.from_native(states[rank])
        load(states, **kwargs)

    # ---- the learning rate scheduler -------------------------------------------------------

    def _has_other_groups(self) -> bool:
        return any(len(cluster.stacked) != len(cluster.native) for cluster in self._clusters)

    def _native_scheduler(self, scheduler: Any) -> Any:
        return SimpleNamespace(
            state_dict=lambda: self._regroup(scheduler.state_dict(), to_native=True),
            load_state_dict=lambda state: scheduler.load_state_dict(
                self._regroup(state, to_native=False)
            ),
        )

    def _regroup(self, state: Mapping[str, Any], to_native: bool) -> dict[str, Any]:
        counts = [(len(c.stacked), len(c.native)) for c in self._clusters]
        counts = counts if to_native else [(native, stacked) for stacked, native in counts]
        return regroup_scheduler(state, counts)

    # ---- the engine ------------------------------------------------------------------------

    def _frozen_attributes(self, attribute: Callable[[Any], Any]) -> OrderedDict[str, Any]:
        """Return something of each frozen parameter; DeepSpeed asks for shapes and for values."""
        frozen = [p for p in self._engine.module.parameters() if not is_trained(p)]
        found = OrderedDict()
        for native in self._table.expand(frozen):
            value = native.holder
            if native.row is not None:
                value = native.part_of(value.detach()).clone()
            found[native.name] = attribute(value)
        return found

    def _shared(self, get_shared_params: Callable[[], dict[str, str]]) -> dict[str, str]:
        """Return DeepSpeed's table of parameters with two names, without the stacks'.

        A stack has the address of its first row, and comes first.
        """
        stacks, first, found = self._table.stack_names(), {}, {}
        for name, other in get_shared_params().items():
            if other not in stacks:
                found[name] = other
            elif other in first:
                found[name] = first[other]
            first.setdefault(other, name)
        return found

    def _load_module(
        self, load: Callable[..., Any], checkpoint: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Load the module, frozen stacks from their experts' files.

        DeepSpeed has loaded them with all others, and then overwrites frozen parameters with those
        in the file of data parallel rank 0, whose experts are others. Here it overwrites a stack
        with itself.
        """
        if checkpoint.get(FROZEN_PARAM_FRAGMENTS) is not None:
            own = {
                self._table.name(param): param.detach()
                for param in self._engine.module.parameters()
                if self._table.is_stack(param)
            }
            checkpoint = {
                **checkpoint,
                FROZEN_PARAM_FRAGMENTS: {**checkpoint[FROZEN_PARAM_FRAGMENTS], **own},
            }
        load(checkpoint, *args, **kwargs)

    def _load_checked(
        self, load: Callable[..., Any], folder: str, tag: str, **kwargs: Any
    ) -> tuple[str | None, Any]:
        engine = self._engine
        if kwargs.get("load_optimizer_states", True) and not kwargs.get("load_module_only", False):
            problem = self._find_problem(folder, tag)
            problems: list[str | None] = [None] * engine.seq_dp_world_size
            # Not DeepSpeed's: its communication logger knows no objects, and ends the process.
            group = engine.seq_data_parallel_group
            torch.distributed.all_gather_object(problems, problem, group=group)
            for rank, problem in enumerate(problems):
                if problem:
                    raise ValueError(
                        f"the optimizer's states in {os.path.join(folder, str(tag))} do not fit "
                        f"this engine (data parallel rank {rank}): {problem}. Resume with the "
                        "settings they were saved with, or load the weights alone: "
                        "load_checkpoint(..., load_module_only=True)"
                    )
        return load(folder, tag, **kwargs)

    def _find_problem(self, folder: str, tag: str) -> str | None:
        """Say why a checkpoint's optimizer states cannot be loaded; None where they can."""
        engine = self._engine
        path = engine._get_ckpt_name(folder, tag)
        if not os.path.exists(path):
            return None  # DeepSpeed says so
        shapes = None
        if engine.zero_optimization():
            model = self._read(path)
            if model["dp_world_size"] != engine.seq_dp_world_size:
                return (
                    f"they were saved by {model['dp_world_size']} data parallel ranks, here are "
                    f"{engine.seq_dp_world_size}"
                )
            path, key = engine._get_zero_ckpt_name(folder, tag), OPTIMIZER_STATE_DICT
            shapes = model["param_shapes"]
        else:
            rank = groups._get_expert_parallel_rank(groups._get_max_expert_size_name())
            path, key = engine._get_optimizer_ckpt_name(folder, tag, rank), "optimizer"
        if not os.path.exists(path):
            return f"{os.path.basename(path)} is missing: ep_size or the ZeRO stage was another"
        state = self._read(path)[key]
        return self._states.difference(state, *([shapes] if engine.zero_optimization() else []))

    def _read(self, path: str) -> Mapping[str, Any]:
        """Read a file; its tensors stay on disk where the format allows it."""
        try:
            return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
        except RuntimeError:
            return self._engine.checkpoint_engine.load(path, map_location="cpu")
