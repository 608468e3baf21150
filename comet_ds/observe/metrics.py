# SPDX-License-Identifier: Apache-2.0
"""Throughput and metrics of layers, written through DeepSpeed's own monitor.

Labels are ``comet_ds/<name>`` for ``RUN_METRICS`` and ``comet_ds_layer_<i>/<name>`` for
``LAYER_METRICS``; the x-axis is DeepSpeed's (``engine.global_samples``). <i> counts the MoE layers
of rank 0's pipeline stage.

Throughput is the mean since the last write. Tokens are counted at the first MoE layer, DeepSpeed's
or ours; without an MoE layer they are not written. Times are rank 0's, of both classes of layer,
means over the forwards of the step before the write. The other values of a layer are written for
comet_ds layers only: those of the last forward before the write, over rank 0's expert parallel
group.

A W&B run's config also says which MoE layer the run has (``comet_ds``), to group and compare by.
"""

from __future__ import annotations

import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from deepspeed.monitor.monitor import Monitor
from deepspeed.utils import groups, logger
from deepspeed.utils.bwc import bwc_tensor_model_parallel_world_size
from torch import Tensor, nn

from comet_ds._compat.deepspeed import (
    TAKE_STEP,
    data_parallel_group,
    expert_tensor_parallel_size,
)
from comet_ds._compat.torch import is_in_backward
from comet_ds.fused.peer.exposure import ExposureMeter
from comet_ds.gate.routing import Routing
from comet_ds.layer import MOELayer
from comet_ds.observe.cta_timeline import LayerRecorder, Timeline, describe, write
from comet_ds.observe.flops import device_peak_flops, flop_per_token, top_k_of
from comet_ds.observe.layer_timer import LayerTimer
from comet_ds.ranks.setup import agree_on_setup
from comet_ds.tuning.cost_model import Traffic

RUN_METRICS = {
    "tokens_per_s": "tokens per second, all data parallel ranks",
    "tflops_per_gpu": "TFLOP/s of a GPU: 6 FLOP a token and active parameter, no attention scores",
    "model_flop_utilisation": "tflops_per_gpu over the data sheet's dense bf16 peak of the GPU",
    "step_time_ms": "wall time of a step, ms",
}
LAYER_METRICS = {
    "forward_ms": "time of the layer's forward with its gate, ms",
    "backward_ms": "time of the layer's backward, ms",
    "exposed_forward_ms": "fused, several ranks: communication not hidden in forward, ms",
    "exposed_backward_ms": "fused, several ranks: communication not hidden in backward, ms",
    "hidden_share_forward": "1 - exposed_forward_ms / the link's time; below 0 if a rank is late",
    "hidden_share_backward": "1 - exposed_backward_ms / the link's time; below 0 if a rank is late",
    "path": "0 reference, 1 pipelined, 2 fused, 3 DeepSpeed's own",
    "l_aux": "auxiliary loss, mean over the ranks",
    "load_imbalance": "rows of the fullest expert over the mean",
    "dropped_share": "dropped routes over all routes",
    "rows_received": "rows that reached this rank's experts",
    "pull_ctas": "fused, several ranks: CTAs that pull tokens in forward; 0: they are pushed",
    "push_ctas": "fused, several ranks: CTAs that push outputs in forward",
    "pull_grad_ctas": "fused, several ranks: CTAs that pull gradients in backward",
    "push_grad_ctas": "fused, several ranks: CTAs that push gradients in backward",
}

TIMELINE_FOLDER = Path("comet_ds_timeline")
PATH_CODES = {"reference": 0, "pipelined": 1, "fused": 2, "deepspeed": 3}
DEFAULT_INTERVAL = 10


def attach_metrics(
    engine: Any, *, interval: int | None = None, timeline_step: int | None = None
) -> MetricsWriter:
    """Write metrics of an engine's MoE layers to its monitor from now on.

    ``comet_ds.initialize`` calls it where a monitor is enabled. Collective over all ranks.

    Args:
        engine: a DeepSpeed engine whose configuration enables a monitor.
        interval: optimizer steps between two writes; None takes ``steps_per_print``, or 10 where
            that is not set either.
        timeline_step: optimizer step in which rank 0 records its first MoE layer's timeline, into
            ``TIMELINE_FOLDER`` and the W&B run; needs ``kernels.use_timeline_kernels`` before the
            first forward. None records nothing.

    Raises:
        ValueError: no monitor is enabled, the engine has metrics already, or the ranks disagree
            about the interval.
    """
    if not engine.monitor.enabled:
        raise ValueError("no monitor is enabled: set wandb, tensorboard or csv_monitor in the JSON")
    if isinstance(getattr(getattr(engine, TAKE_STEP), "__self__", None), MetricsWriter):
        raise ValueError("the engine has metrics already")
    num_steps = interval or engine.steps_per_print() or DEFAULT_INTERVAL
    agree_on_setup({"metrics_interval": num_steps}, range(dist.get_world_size()))
    return MetricsWriter(engine, num_steps, timeline_step)


class TokenCounter:
    """Counts the tokens that enter a layer in training, on this rank.

    Attributes:
        num_tokens: tokens so far, without those of forwards that activation checkpointing repeats.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.num_tokens = 0
        layer.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        if layer.training and not is_in_backward():
            hidden_states = args[0] if args else kwargs["hidden_states"]
            self.num_tokens += hidden_states.shape[:-1].numel()


def layer_label(index: int) -> str:
    """Return the prefix of a layer's labels; W&B makes a section for each prefix."""
    return f"comet_ds_layer_{index:02d}"


class MetricsWriter:
    """Writes every metric every ``interval`` optimizer steps.

    A step that writes waits for the device, and issues one small all-reduce for each layer and one
    more. Steps in between cost some integer arithmetic on the host and never wait.
    """

    def __init__(self, engine: Any, interval: int, timeline_step: int | None = None) -> None:
        self.engine, self.interval, self.timeline_step = engine, interval, timeline_step
        modules = [m for m in engine.module.modules() if isinstance(m, DeepSpeedMoE)]
        self.layers = [m.deepspeed_moe for m in modules]
        self._counter = TokenCounter(modules[0]) if modules else None
        self._timers = [LayerTimer(m) for m in modules]
        self._flop_per_token = flop_per_token(engine.module)
        self._peak_flops = device_peak_flops(torch.device(engine.device))
        self._recorder = None
        if modules and dist.get_rank() == 0:
            self._describe_run(modules[0])
            if timeline_step is not None:
                self._recorder = LayerRecorder(modules[0], self._is_timeline_step)
        self._num_steps = 0
        self._arm()
        self._since = time.perf_counter()
        # Both DeepSpeed's engine and its pipeline engine take their optimizer step here.
        self._take_model_step = getattr(engine, TAKE_STEP)
        setattr(engine, TAKE_STEP, self._step)

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        result = self._take_model_step(*args, **kwargs)
        self._num_steps += 1
        if self._recorder is not None and self.engine.global_steps >= self.timeline_step:
            self._write_timeline(self._recorder.read_timeline())
            self._recorder = None
        if self._num_steps == self.interval:
            self.write()
        self._arm()
        return result

    def _arm(self) -> None:
        """Time the layers in the step before a write, and in no other."""
        is_armed = self._num_steps == self.interval - 1
        for layer, timer in zip(self.layers, self._timers, strict=True):
            timer.is_armed = is_armed
            if isinstance(layer, MOELayer):
                is_metered = is_armed and layer.path == "fused" and layer.fused.shape is not None
                layer.fused.meter = ExposureMeter(self.engine.device) if is_metered else None

    def _is_timeline_step(self) -> bool:
        return self.engine.global_steps + 1 == self.timeline_step

    def write(self) -> None:
        """Collect and write now. Collective over all ranks; waits for the device."""
        metrics: dict[str, float] = {}
        for index, (layer, timer) in enumerate(zip(self.layers, self._timers, strict=True)):
            values = timer.read()
            if isinstance(layer, MOELayer) and layer.routing is not None:
                values |= _layer_metrics(layer, layer.routing)
            metrics |= {f"{layer_label(index)}/{name}": v for name, v in values.items()}
        counted = self._counter.num_tokens if self._counter else 0
        num_tokens = torch.tensor([counted], device=self.engine.device)
        dist.all_reduce(num_tokens, group=data_parallel_group())
        total = int(num_tokens)  # waits for the device, so the time is read after it
        now = time.perf_counter()
        seconds = now - self._since
        values = {"step_time_ms": 1e3 * seconds / max(self._num_steps, 1)}
        if total:
            num_replicas = dist.get_world_size(group=data_parallel_group())
            flops = self._flop_per_token * total / num_replicas / seconds
            values |= {"tokens_per_s": total / seconds, "tflops_per_gpu": flops / 1e12}
            if self._peak_flops:
                values["model_flop_utilisation"] = flops / self._peak_flops
        metrics |= {f"comet_ds/{name}": value for name, value in values.items()}
        self._since, self._num_steps = now, 0
        if self._counter:
            self._counter.num_tokens = 0
        self._log(metrics)

    def _log(self, metrics: dict[str, float]) -> None:
        """Hand the metrics to every monitor, to W&B in one record.

        DeepSpeed's ``write_events`` would send W&B a record for each metric.
        """
        monitor, step = self.engine.monitor, self.engine.global_samples
        events = [(name, value, step) for name, value in metrics.items()]
        if self._wandb() is None:
            monitor.write_events(events)
            return
        monitor.wandb_monitor.log(metrics, step=step)
        for other in vars(monitor).values():
            if isinstance(other, Monitor) and other is not monitor.wandb_monitor:
                other.write_events(events)

    def _wandb(self) -> ModuleType | None:
        """Return the module wandb where this process has a W&B run, else None."""
        monitor = self.engine.monitor.wandb_monitor
        if monitor is None or not monitor.enabled:
            return None
        import wandb

        return wandb

    def _write_timeline(self, timeline: Timeline | None) -> None:
        """Write the first layer's timeline to files, and to the W&B run if there is one."""
        step = self.timeline_step
        if timeline is None or not timeline.spans:
            path = getattr(self.layers[0], "path", "DeepSpeed's own")
            why = f"this is step {self.engine.global_steps}, the layer's path is {path}"
            logger.warning(f"comet_ds: no timeline of step {step}: {why}")
            return
        title = f"first MoE layer, step {step}, rank 0"
        try:
            written = write(timeline, TIMELINE_FOLDER / f"step_{step}", title)
        except OSError as error:
            logger.warning(f"comet_ds: no timeline of step {step}: {error}")
            return
        files = ", ".join(map(str, written))
        logger.warning(f"comet_ds: timeline of step {step} in {files}\n{describe(timeline)}")
        if (wandb := self._wandb()) is None:
            return
        rows = [
            [s.gemm, s.end_us - s.start_us, s.computing, s.communicating, s.hidden]
            for s in timeline.summaries()
        ]
        columns = ["pass", "us", "computing", "communicating", "hidden share"]
        logged = {"comet_ds/timeline_launches": wandb.Table(columns=columns, data=rows)}
        if pictures := [path for path in written if path.suffix == ".png"]:
            logged["comet_ds/timeline"] = wandb.Image(str(pictures[0]), caption=title)
        if (hidden := timeline.hidden_share()) is not None:
            logged["comet_ds/timeline_hidden_share"] = hidden
        wandb.log(logged, step=self.engine.global_samples)

    def _describe_run(self, moe: DeepSpeedMoE) -> None:
        """Write the kind and sizes of the MoE layers into the W&B run's config."""
        if (wandb := self._wandb()) is None:
            return
        facts = {
            "moe": "comet_ds" if isinstance(moe.deepspeed_moe, MOELayer) else "deepspeed",
            "num_moe_layers": len(self.layers),
            "num_experts": moe.num_experts,
            "top_k": top_k_of(moe),
            "ep_size": moe.ep_size,
            "world_size": dist.get_world_size(),
        }
        wandb.run.config.update({"comet_ds": facts}, allow_val_change=True)


def _layer_metrics(layer: MOELayer, routing: Routing) -> dict[str, float]:
    """Return a layer's metrics over its EP group; one all-reduce, one wait."""
    num_experts = routing.exp_counts.numel()
    ids = routing.topk_ids.flatten() + 1  # bin 0 takes the dropped routes
    bins = torch.zeros(num_experts + 1, dtype=torch.float64, device=ids.device)
    bins.scatter_add_(0, ids, torch.ones_like(ids, dtype=bins.dtype))
    wanted = routing.exp_counts.sum(dtype=bins.dtype).view(1)
    message = torch.cat([bins[1:], wanted, routing.l_aux.to(bins.dtype).view(1)])
    if layer.ep_size > 1:
        dist.all_reduce(message, group=layer._group())
    *rows, wanted, l_aux = message.tolist()
    total = sum(rows)
    local = layer.num_local_experts
    first = local * dist.get_rank(group=layer._group()) if layer.ep_size > 1 else 0
    received = sum(rows[first : first + local])
    if expert_tensor_parallel_size() == 1:
        # The ranks of a tensor parallel group hold the same routes and share them.
        received /= bwc_tensor_model_parallel_world_size(groups.mpu)
    return {
        "path": PATH_CODES[layer.path],
        "l_aux": l_aux / layer.ep_size,
        "load_imbalance": max(rows) * num_experts / total if total else 0.0,
        "dropped_share": 1 - total / wanted if wanted else 0.0,
        "rows_received": received,
        **_cta_split(layer),
        **_exposure(layer),
    }


def _exposure(layer: MOELayer) -> dict[str, float]:
    """Return the communication that was not hidden, where it was measured; waits for the device."""
    fused = layer.fused
    if fused.meter is None or fused.shape is None:
        return {}
    wire_ms = 2e3 * Traffic.expected(fused.shape).wire_seconds()
    result = {}
    for direction, ms in fused.meter.read(fused.shape.num_sms).items():
        result[f"exposed_{direction}_ms"] = ms
        if wire_ms:
            result[f"hidden_share_{direction}"] = 1 - ms / wire_ms
    return result


def _cta_split(layer: MOELayer) -> dict[str, float]:
    """Return the last forward's communication CTAs of each GEMM, where there were any."""
    cta_split = layer.fused.cta_split
    if layer.path != "fused" or cta_split is None:
        return {}
    return {f"{what}_ctas": choice.num_comm_ctas for what, choice in cta_split._asdict().items()}
