# SPDX-License-Identifier: Apache-2.0
"""Whether an optimizer can train stacks or needs one parameter per expert.

An elementwise optimizer trains a stack exactly as it trains the experts' own parameters. One that
computes something from a whole parameter (a norm, a factored moment, an orthogonalisation) needs
one parameter per expert. Only optimizers that are known to be elementwise get stacks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from deepspeed.utils import logger
from torch import nn

from comet_ds._compat.deepspeed import Engine, config_of
from comet_ds.experts.stacked import StackedExperts
from comet_ds.experts.unstacked import unstacked_parameters

# Full class names, so that nothing has to be imported. A subclass has another name: it may compute
# something else.
ELEMENTWISE = {
    *(f"torch.optim.{name.lower()}.{name}" for name in (
        "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop",
        "Rprop", "SGD")),
    "apex.optimizers.fused_adam.FusedAdam",
    "deepspeed.ops.adagrad.cpu_adagrad.DeepSpeedCPUAdagrad",
    "deepspeed.ops.adam.cpu_adam.DeepSpeedCPUAdam",
    "deepspeed.ops.adam.fused_adam.FusedAdam",
    "deepspeed.ops.lion.cpu_lion.DeepSpeedCPULion",
    "deepspeed.ops.lion.fused_lion.FusedLion",
    "lion_pytorch.lion_pytorch.Lion",
}  # fmt: skip
# DeepSpeed's Muon orthogonalises the last two dimensions, so each expert's matrix by itself.
MUON = "deepspeed.runtime.zero.muon.muon_optimizer.MuonWithAuxAdam"
# DeepSpeed's own names in the JSON; any other name is that of a class in torch.optim.
ELEMENTWISE_NAMES = ("adam", "adamw", "adagrad", "lion")


def stacked_experts(module: nn.Module) -> list[StackedExperts]:
    """Return the stacked experts of all layers of a model."""
    return [m for m in module.modules() if isinstance(m, StackedExperts) and m.is_stacked]


def choose_layout(
    engine: Engine, client_optimizer: Any, parameters: list[Any]
) -> tuple[Any, list[Any]]:
    """Unstack the engine's experts if its optimizer needs one parameter per expert.

    Args:
        engine: an engine that has its module and no optimizer yet.
        client_optimizer: the user's optimizer, a function that makes one from parameters, or None.
        parameters: the optimizer's parameters, or groups of them.

    Returns:
        The user's optimizer (the function's result if it was a function), and the parameters. If
        the experts were unstacked, both have the experts' own parameters in place of the stacks.

    Raises:
        ValueError: the user's optimizer needs one parameter per expert and already has a state for
            a stack.
    """
    reason = _reason_of_engine(engine)
    if client_optimizer is None:
        reason = reason or _reason_of_name(engine)
    is_made = isinstance(client_optimizer, torch.optim.Optimizer)
    if is_made:
        reason = reason or _reason_of_class(client_optimizer)
    if reason:
        _unstack(engine, reason)
    if is_made:
        _check_no_state(client_optimizer)
        client_optimizer.param_groups[:] = _replace(client_optimizer.param_groups)
    elif client_optimizer is not None:
        client_optimizer = _call(client_optimizer, engine, _replace(parameters))
    return client_optimizer, _replace(parameters)


def _call(make: Callable[[list[Any]], Any], engine: Engine, parameters: list[Any]) -> Any:
    """Return the optimizer that a user's function makes; call it again if it cannot use stacks."""
    if not stacked_experts(engine.module):
        return make(parameters)
    try:
        optimizer = make(parameters)
        reason = _reason_of_class(optimizer)
    except Exception as error:
        reason = f"the optimizer refuses stacks: {error}"
    if reason is None:
        return optimizer
    _unstack(engine, reason)
    return make(_replace(parameters))


def _unstack(engine: Engine, reason: str) -> None:
    stacked = stacked_experts(engine.module)
    if not stacked:
        return
    if engine.global_rank == 0:
        logger.warning(f"comet_ds: one parameter per expert in {len(stacked)} layers: {reason}")
    for experts in stacked:
        experts.unstack(reason, log=False)
    engine.param_names = {param: name for name, param in engine.module.named_parameters()}
    deepspeed.set_optimizer_flags(config_of(engine), engine.module)


def _replace(parameters: list[Any]) -> list[Any]:
    """Replace former stacks in a list of parameters or of groups by the experts' parameters."""
    if not any(isinstance(item, dict) for item in parameters):
        return unstacked_parameters(parameters)
    for group in parameters:
        params = unstacked_parameters(group["params"])
        if len(params) != len(group["params"]):
            group.pop("param_names", None)
        group["params"] = params
    return parameters


def _reason_of_engine(engine: Engine) -> str | None:
    """Return why an engine needs one parameter per expert, whatever its optimizer is."""
    if getattr(engine, "zenflow", False):
        return "ZenFlow selects columns of matrices"
    if engine.zero_elastic_checkpoint():
        return '"elastic_checkpoint" is set'
    if engine.load_universal_checkpoint():
        return "universal checkpoints know parameters by name"
    return None


def _reason_of_name(engine: Engine) -> str | None:
    """Return why the JSON's optimizer needs one parameter per expert, None if it does not."""
    name = engine.optimizer_name()
    if name in ELEMENTWISE_NAMES:
        return None
    if name == "muon":
        return _reason_of_muon(engine)
    cls = getattr(torch.optim, name, None)
    if cls is not None and _full_name(cls) in ELEMENTWISE:
        return None
    return f"the optimizer {name} may compute something from whole parameters"


def _reason_of_muon(engine: Engine) -> str | None:
    if (engine.optimizer_params() or {}).get("per_head_muon", False):
        return '"per_head_muon" goes by the shapes of parameters'
    _mark_for_muon(engine.module)
    return None


def _mark_for_muon(module: nn.Module) -> None:
    """Tell DeepSpeed's Muon that a stack of matrices holds one matrix per expert.

    Source: ``deepspeed/moe/ep_experts.py``.
    """
    for experts in stacked_experts(module):
        for stack in experts.stacks().values():
            vars(stack)["is_expert_group"] = stack.dim() == 3


def _reason_of_class(optimizer: Any) -> str | None:
    """Return why a user's optimizer needs one parameter per expert, None if it does not."""
    name = _full_name(type(optimizer))
    if name in ELEMENTWISE or name == MUON:
        return None
    return f"the optimizer {type(optimizer).__name__} may compute something from whole parameters"


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _check_no_state(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that has a state for a former stack."""
    for param, state in optimizer.state.items():
        if getattr(param, "_unstacked", None) is not None and state:
            raise ValueError(
                f"{type(optimizer).__name__} has a state for a stack of experts of shape "
                f"{tuple(param.shape)}, but needs one parameter per expert: give it to "
                'deepspeed.initialize before its first step, or set "stack_experts" to false'
            )
