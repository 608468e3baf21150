# SPDX-License-Identifier: Apache-2.0
"""Throughput and per-layer metrics, written through DeepSpeed's own monitor.

Labels, at the x-axis value DeepSpeed uses (``engine.global_samples``):

    comet_ds/tokens_per_s               tokens of all data parallel ranks per second
    comet_ds/step_time_ms               wall time of a step
    comet_ds/layer_<i>/path             0 reference, 1 pipelined
    comet_ds/layer_<i>/l_aux            auxiliary loss, mean over the ranks
    comet_ds/layer_<i>/load_imbalance   rows of the fullest expert over the mean
    comet_ds/layer_<i>/dropped_share    routes dropped over routes wanted
    comet_ds/layer_<i>/rows_received    rows that reached this rank's experts

Throughput is the mean since the last write; layer values are of the last forward before it, over
rank 0's expert parallel group. <i> counts the MoE layers of rank 0's pipeline stage.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.utils import groups

from comet_ds.layer import MoE, MOELayer

PATH_CODES = {"reference": 0, "pipelined": 1}


def attach_metrics(engine: Any, *, interval: int | None = None) -> MetricsWriter:
    """Write metrics of an engine's MoE layers to its monitor from now on.

    Call it on all ranks. ``comet_ds.initialize`` does where a monitor is enabled.

    Args:
        engine: a DeepSpeed engine whose configuration enables a monitor.
        interval: optimizer steps between two writes; None takes ``steps_per_print``.

    Raises:
        ValueError: no monitor is enabled.
    """
    if not engine.monitor.enabled:
        raise ValueError("no monitor is enabled: set wandb, tensorboard or csv_monitor in the JSON")
    return MetricsWriter(engine, interval or engine.steps_per_print())


class MetricsWriter:
    """Writes an event per metric every ``interval`` optimizer steps.

    Steps in between cost two integer comparisons on the host; a step that writes waits for the
    device once and issues two small all-reduces.
    """

    def __init__(self, engine: Any, interval: int) -> None:
        self.engine, self.interval = engine, interval
        modules = [m for m in engine.module.modules() if isinstance(m, MoE)]
        self.layers: list[MOELayer] = [m.deepspeed_moe for m in modules]
        self._since = time.perf_counter()
        self._step_since = engine.global_steps
        self._tokens_since = self._tokens_seen()
        # Both DeepSpeed's engine and its pipeline engine take their optimizer step here.
        self._take_model_step = engine._take_model_step
        engine._take_model_step = self._step

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        result = self._take_model_step(*args, **kwargs)
        if self.engine.global_steps - self._step_since >= self.interval:
            self.write()
        return result

    def write(self) -> None:
        """Collect and write now. Collective over all ranks; waits for the device."""
        step, events = self.engine.global_samples, []
        for index, layer in enumerate(self.layers):
            if layer.routing is not None:
                values = _layer_metrics(layer)
                events += [(f"comet_ds/layer_{index}/{k}", v, step) for k, v in values.items()]
        # Read last: the layers' values have waited for the device.
        tokens = self._tokens_seen()
        num_tokens = torch.tensor([tokens - self._tokens_since], device=self.engine.device)
        dist.all_reduce(num_tokens, group=groups._get_data_parallel_group())
        total, now = int(num_tokens), time.perf_counter()
        seconds = now - self._since
        steps = self.engine.global_steps - self._step_since
        events.append(("comet_ds/tokens_per_s", total / seconds, step))
        events.append(("comet_ds/step_time_ms", 1e3 * seconds / max(steps, 1), step))
        self._since, self._step_since = now, self.engine.global_steps
        self._tokens_since = tokens
        self.engine.monitor.write_events(events)

    def _tokens_seen(self) -> int:
        return self.layers[0].num_tokens_seen if self.layers else 0


def _layer_metrics(layer: MOELayer) -> dict[str, float]:
    """Return a layer's metrics over its EP group; one all-reduce, one wait."""
    routing = layer.routing
    kept = routing.topk_ids[routing.topk_ids >= 0]
    num_experts = routing.exp_counts.numel()
    rows = torch.zeros(num_experts, dtype=torch.float64, device=kept.device)
    rows.scatter_add_(0, kept, torch.ones_like(kept, dtype=rows.dtype))
    wanted = routing.exp_counts.sum(dtype=rows.dtype).view(1)
    message = torch.cat([rows, wanted, routing.l_aux.to(rows.dtype).view(1)])
    if layer.ep_size > 1:
        dist.all_reduce(message, group=layer.ep_group)
    *rows, wanted, l_aux = message.tolist()
    total = sum(rows)
    local = layer.num_local_experts
    first = local * dist.get_rank(group=layer.ep_group) if layer.ep_size > 1 else 0
    return {
        "path": PATH_CODES[layer.path],
        "l_aux": l_aux / layer.ep_size,
        "load_imbalance": max(rows) * num_experts / total if total else 0.0,
        "dropped_share": 1 - total / wanted if wanted else 0.0,
        "rows_received": sum(rows[first : first + local]),
    }
