# SPDX-License-Identifier: Apache-2.0
"""EngineLayout: an engine with stacked experts saves and loads DeepSpeed's own checkpoint layout.

The layout of an engine whose layers are DeepSpeed's, with one parameter per expert, is called
native. While a checkpoint is saved or loaded, methods of the engine, its optimizer and its learning
rate scheduler are replaced by ones that convert between stacks and native parameters.
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
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from comet_ds._compat.deepspeed import (
    FROZEN_ATTRIBUTES,
    LOAD_CHECKPOINT,
    PARAM_SHAPES,
    SHARED_PARAMS,
    Engine,
    model_file,
    optimizer_file,
    zero_file,
)
from comet_ds.checkpoints.flat_states import FlatStates
from comet_ds.checkpoints.layout import Cluster, ParameterTable, find_clusters, is_trained
from comet_ds.checkpoints.states import ParameterStates, regroup_scheduler

_States = FlatStates | ParameterStates


@contextlib.contextmanager
def replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """Replace attributes of one object inside a ``with`` statement."""
    before = {name: owner.__dict__[name] for name in attributes if name in owner.__dict__}
    owner.__dict__.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del owner.__dict__[name]
        owner.__dict__.update(before)


class EngineLayout:
    """Conversion between an engine with stacked experts and the native layout.

    Args:
        engine: the engine, while its optimizer is configured.
        basic_optimizer: the optimizer before DeepSpeed wraps it; None without an optimizer.
    """

    def __init__(self, engine: Engine, basic_optimizer: torch.optim.Optimizer | None) -> None:
        self._engine = engine
        self._table = ParameterTable(engine.module, engine.param_names)
        self._clusters: list[Cluster] = []
        self._states: _States | None = None
        if basic_optimizer is not None:
            self._clusters = find_clusters(basic_optimizer.param_groups, self._table)
            is_flattened = (
                engine.zero_optimization() or engine.fp16_enabled() or engine.bfloat16_enabled()
            )
            if is_flattened:
                self._join_frozen_groups(basic_optimizer)

    def _join_frozen_groups(self, optimizer: torch.optim.Optimizer) -> None:
        """Move the parameters of a fully frozen group to another group of its cluster.

        A stack above DeepSpeed's size limit has a group of its own, and DeepSpeed cannot flatten a
        group whose parameters are all frozen. In the native layout every group has a trained one.
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
        """Make the engine, its optimizer and its scheduler use the native layout.

        Raises:
            RuntimeError: the experts were unstacked after the optimizer was made.
        """
        engine, optimizer = self._engine, self._engine.optimizer
        self._table.check_current()
        engine_methods: dict[str, Any] = {
            FROZEN_ATTRIBUTES: self._frozen_attributes,
            SHARED_PARAMS: functools.partial(self._shared, getattr(engine, SHARED_PARAMS)),
            "load_module_state_dict": functools.partial(
                self._load_module, engine.load_module_state_dict
            ),
        }
        with contextlib.ExitStack() as stack:
            if optimizer is not None and self._clusters:
                states = self._make_states()
                engine_methods[LOAD_CHECKPOINT] = functools.partial(
                    self._load_checked, states, getattr(engine, LOAD_CHECKPOINT)
                )
                if isinstance(states, FlatStates):
                    engine_methods[PARAM_SHAPES] = states.param_shapes
                load = self._load_zero if engine.zero_optimization() else self._load_optimizer
                save = functools.partial(self._save_optimizer, states, optimizer.state_dict)
                optimizer_methods = {
                    "state_dict": save,
                    "load_state_dict": functools.partial(load, states, optimizer.load_state_dict),
                }
                stack.enter_context(replaced(optimizer, **optimizer_methods))
                if engine.lr_scheduler is not None and self._has_other_groups():
                    engine_methods["lr_scheduler"] = self._native_scheduler(engine.lr_scheduler)
            stack.enter_context(replaced(engine, **engine_methods))
            yield

    def _make_states(self) -> _States:
        optimizer = self._engine.optimizer
        if self._states is None:
            flat = DeepSpeedZeroOptimizer | BF16_Optimizer | FP16_Optimizer
            kind = FlatStates if isinstance(optimizer, flat) else ParameterStates
            self._states = kind(optimizer, self._clusters, self._table)
        return self._states

    # ---- the optimizer ---------------------------------------------------------------------

    @staticmethod
    def _save_optimizer(states: _States, save: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        return states.to_native(save())

    @staticmethod
    def _load_optimizer(
        states: _States, load: Callable[..., None], state_dict: Mapping[str, Any], **kwargs: Any
    ) -> None:
        load(states.from_native(state_dict), **kwargs)

    def _load_zero(
        self, states: _States, load: Callable[..., None], state_dict_list: list[Any], **kwargs: Any
    ) -> None:
        rank = dist.get_rank(group=self._engine.optimizer.dp_process_group)
        by_rank = list(state_dict_list)
        by_rank[rank] = states.from_native(by_rank[rank])
        load(by_rank, **kwargs)

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
        """Return ``attribute`` of each frozen native parameter; DeepSpeed asks for shape, value."""
        frozen = [p for p in self._engine.module.parameters() if not is_trained(p)]
        values = OrderedDict()
        for native in self._table.expand(frozen):
            value = native.holder
            if native.expert is not None:
                value = native.part_of(value.detach()).clone()
            values[native.name] = attribute(value)
        return values

    def _shared(self, get_shared_params: Callable[[], dict[str, str]]) -> dict[str, str]:
        """Return DeepSpeed's table of parameters with two names, without names of stacks.

        DeepSpeed goes by addresses. A stack has the address of its first expert's view and is
        listed before it, so the view would be taken for a second name of the stack.
        """
        stacks, first, names = self._table.stack_names(), {}, {}
        for name, other in get_shared_params().items():
            if other not in stacks:
                names[name] = other
            elif other in first:
                names[name] = first[other]
            first.setdefault(other, name)
        return names

    def _load_module(
        self, load: Callable[..., Any], checkpoint: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Load the module, keeping frozen stacks as they were loaded from the experts' files.

        DeepSpeed first loads all parameters, then overwrites frozen ones with those in the file of
        data parallel rank 0, which has other experts. Here it overwrites a stack with itself.
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
        self, states: _States, load: Callable[..., Any], folder: str, tag: str, **kwargs: Any
    ) -> tuple[str | None, Any]:
        engine = self._engine
        if kwargs.get("load_optimizer_states", True) and not kwargs.get("load_module_only", False):
            problem = self._find_problem(states, folder, tag)
            problems: list[str | None] = [None] * engine.seq_dp_world_size
            # torch's function: DeepSpeed's communication logger fails on objects.
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

    def _find_problem(self, states: _States, folder: str, tag: str) -> str | None:
        """Return why a checkpoint's optimizer states cannot be loaded, None if they can."""
        engine = self._engine
        path = model_file(engine, folder, tag)
        if not os.path.exists(path):
            return None  # DeepSpeed reports the missing file
        shapes = None
        if engine.zero_optimization():
            model = self._read(path)
            if model["dp_world_size"] != engine.seq_dp_world_size:
                return (
                    f"they were saved by {model['dp_world_size']} data parallel ranks, this engine "
                    f"has {engine.seq_dp_world_size}"
                )
            path, key = zero_file(engine, folder, tag), OPTIMIZER_STATE_DICT
            shapes = model["param_shapes"]
        else:
            path, key = optimizer_file(engine, folder, tag), "optimizer"
        if not os.path.exists(path):
            return f"{os.path.basename(path)} is missing: ep_size or the ZeRO stage was different"
        state = self._read(path)[key]
        return states.difference(state, *([shapes] if engine.zero_optimization() else []))

    def _read(self, path: str) -> Mapping[str, Any]:
        """Read a file; its tensors stay on disk if the format allows it."""
        try:
            return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
        except RuntimeError:
            return self._engine.checkpoint_engine.load(path, map_location="cpu")
