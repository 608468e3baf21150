# SPDX-License-Identifier: Apache-2.0
"""comet_ds.initialize: deepspeed.initialize that also applies the "comet_ds" block of the JSON."""

from __future__ import annotations

import inspect
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.utils import logger

from comet_ds.config import CONFIG_KEY, CometConfig, read_block
from comet_ds.kernels import use_timeline_kernels
from comet_ds.layer import MoE
from comet_ds.observe.metrics import attach_metrics
from comet_ds.ranks.setup import agree_on_setup
from comet_ds.zero.optimizer_groups import split_expert_groups, splitting


def initialize(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """Initialize a DeepSpeed engine; apply the "comet_ds" block to the model's MoE layers.

    Signature and result are ``deepspeed.initialize``'s. The block's options of layers and groups
    replace a layer's own where the block sets them. Experts get parameter groups of their own in an
    optimizer and scheduler that the caller has built (``split_expert_groups``). Metrics are
    attached when the configuration enables a monitor (W&B, TensorBoard, CSV) and the block does not
    switch them off.

    Raises:
        ValueError: an unknown key or bad value in the block, before the engine is built; ranks that
            disagree about the block; layers of an expert parallel group that have different options
            of a group; a timeline without a monitor.
    """
    call = inspect.signature(deepspeed.initialize).bind(*args, **kwargs)
    given = call.arguments
    config = given.get("config")
    if config is None:
        config = given.get("config_params")
    if config is None:
        config = getattr(given.get("args"), "deepspeed_config", None)
    block = read_block(config)
    options = CometConfig.parse(block)
    model = given.get("model")
    layers = [m for m in model.modules() if isinstance(m, MoE)] if model is not None else []
    if block is not None:
        if not layers:
            logger.warning(f'"{CONFIG_KEY}" is set, but the model has no comet_ds.MoE layer')
        for layer in layers:
            layer.configure(options)
    if options.timeline_step is not None:
        use_timeline_kernels()
    if layers:
        _split_groups(given)
    result = deepspeed.initialize(*call.args, **call.kwargs)
    engine = result[0]
    agree_on_setup(options.model_dump(), range(dist.get_world_size()))
    if options.metrics and getattr(engine, "monitor", None) and engine.monitor.enabled:
        attach_metrics(
            engine, interval=options.metrics_interval, timeline_step=options.timeline_step
        )
    elif options.timeline_step is not None:
        raise ValueError('"timeline_step" needs metrics and a monitor: enable one in the JSON')
    return result


def _split_groups(given: dict[str, Any]) -> None:
    """Give experts groups of their own in the caller's optimizer and scheduler."""
    optimizer, scheduler = given.get("optimizer"), given.get("lr_scheduler")
    if isinstance(optimizer, torch.optim.Optimizer):
        # A callable makes the scheduler later, from the groups it finds then.
        is_made = not callable(scheduler) or hasattr(scheduler, "step")
        split_expert_groups(optimizer, scheduler if is_made else None)
    elif callable(optimizer):
        given["optimizer"] = splitting(optimizer)


initialize.__signature__ = inspect.signature(deepspeed.initialize)
