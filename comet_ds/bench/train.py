# SPDX-License-Identifier: Apache-2.0
"""A whole model with each of several MoE layers: its training checked, then its steps timed.

Model, text and training step are those of ``examples/train_gpt_moe.py``. The configuration is
``examples/ds_config_large.json`` with another ZeRO stage and batch. A layer's options follow its
name, ``layer:key=value:key=value``, and go into its block of the configuration: ``comet_ds``, or
AutoEP's ``expert_parallel``. AutoEP never drops a route; the other layers drop those that exceed
the capacity, unless they are told not to.

Nothing is timed before a model of two such layers trains with ours as with DeepSpeed's, from the
same weights, with the same batches and random numbers; ``check_training`` says how closely. Where
DeepSpeed's layer is timed, the loss curves of the whole models must agree as closely.

All layers run in the same processes. An engine is built, warmed up, timed and freed, then the next
layer's; all of it again in every round. A block is several steps, enqueued without waiting; its
time lasts from a barrier of the ranks until the GPU is done. The slowest rank counts. Figures are
medians over the blocks of all rounds.

FLOP are counted for each token: 6 for each weight in the matrices of attention, router, head and
``top_k`` experts, dropped or not, and 6 H L in each layer for attention in a sequence of L tokens:
a token attends to half of them on average. Embeddings and norms count nothing.

Activities and times by kind are those of one more step on rank 0, under the profiler
(``comet_ds.bench.profile``). The busy share is the time in which that step has an activity, over
the time of a step without the profiler, which slows down the host but not the GPU. Peak memory is
that of torch's allocator after the warm-up. `outside` is device memory in use that the allocator
does not hold: contexts, NCCL, and the memory that ranks share, which comet_ds keeps once allocated.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from deepspeed import comm as dist

from comet_ds.bench.models import EXAMPLES, Run, Variant, Workload
from comet_ds.bench.profile import profile_step
from comet_ds.bench.timing import slowest_rank
from comet_ds.observe.flops import device_peak_flops

NUM_CHECKED_STEPS = 10
# Relative differences allowed between training with our layer and with DeepSpeed's: in the loss
# before the first update, in the norm of its gradients, and in later losses. Rounding drives later
# losses apart: they may also differ by NOISE_FACTOR times what rounding does to DeepSpeed's own.
FIRST_TOLERANCE, NORM_TOLERANCE, CURVE_TOLERANCE = 2e-3, 2e-2, 3e-2
NOISE_FACTOR = 2
GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """Numbers of rounds, blocks and steps; the module's docstring says what they are."""

    rounds: int = 2
    blocks: int = 3  # timed blocks of a round
    steps: int = 4  # steps of a block
    warmup: int = 3  # steps before the blocks
    phases: bool = False  # whether to time forward, backward and optimizer too
    config: Path = EXAMPLES / "ds_config_large.json"

    @property
    def num_steps(self) -> int:
        """Largest number of steps that an engine takes."""
        return self.warmup + self.blocks * self.steps + 2


def curve_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """Return the largest relative difference of losses after the first update."""
    pairs = list(zip(ours["losses"], theirs["losses"], strict=True))[1:NUM_CHECKED_STEPS]
    return max((abs(a - b) / b for a, b in pairs), default=0.0)


def check_training(
    ours: dict[str, Any], theirs: dict[str, Any], what: str, noise: float = 0.0
) -> str:
    """Compare our layer's training with DeepSpeed's.

    Args:
        ours: ``losses`` by step and, optionally, the first step's ``grad_norm``.
        theirs: the same of DeepSpeed's layer.
        what: names the pair in errors.
        noise: ``curve_difference`` of two trainings with DeepSpeed's layer that differ by
            rounding alone.

    Returns:
        the differences, as text.

    Raises:
        AssertionError: losses or norm differ by more than the tolerances, or are not finite.
    """
    pairs = list(zip(ours["losses"], theirs["losses"], strict=True))[:NUM_CHECKED_STEPS]
    first, worst, norm = abs(pairs[0][0] / pairs[0][1] - 1), curve_difference(ours, theirs), 0.0
    if "grad_norm" in ours:
        norm = abs(ours["grad_norm"] - theirs["grad_norm"]) / theirs["grad_norm"]
    limits = FIRST_TOLERANCE, NORM_TOLERANCE, max(CURVE_TOLERANCE, NOISE_FACTOR * noise)
    found = f"first loss {first:.1e}, gradients' norm {norm:.1e}, "
    found += f"{len(pairs) - 1} losses {worst:.1e}"
    if noise:
        found += f" (rounding alone {noise:.1e})"
    is_close = all(x <= limit for x, limit in zip((first, norm, worst), limits, strict=True))
    losses = [loss for pair in pairs for loss in pair]
    assert is_close and all(map(math.isfinite, [*losses, norm])), (
        f"{what} does not train as DeepSpeed's layer: relative differences are {found}, "
        f"allowed are {limits}; losses, DeepSpeed's second: {pairs}"
    )
    return found


def check_small_model(
    example: ModuleType, work: Workload, variants: Sequence[Variant], config: Path
) -> dict[str, str]:
    """Check the training of every variant of ours on a small model, against DeepSpeed's layer.

    Returns:
        the differences as text, by label.

    Raises:
        AssertionError: as ``check_training``.
    """
    small = replace(work, layers=min(work.layers, 2), micro_batches=1)
    found: dict[str, Any] = {}
    ours = [variant for variant in variants if variant.moe == "comet_ds"]

    def train(variant: Variant, scale: float = 1.0) -> dict[str, Any]:
        options = {"draw_experts": True, "scale": scale}
        run = Run(example, small, variant, config, NUM_CHECKED_STEPS, **options)
        run.train(1)
        norm = run.grad_norm()
        run.train(NUM_CHECKED_STEPS - 1)
        result = {"losses": run.mean_losses(), "grad_norm": norm}
        run.free()
        return result

    theirs, noise = Variant("deepspeed", "deepspeed", {}), 0.0
    for variant in [theirs, *ours] if ours else []:
        found[variant.label] = train(variant)
    differences = [curve_difference(found[v.label], found["deepspeed"]) for v in ours]
    if max(differences, default=0.0) > CURVE_TOLERANCE:
        # With this factor about half of all weights round to their neighbour in bf16.
        noise = curve_difference(train(theirs, scale=1 + 2**-9), found["deepspeed"])
    return {
        variant.label: check_training(
            found[variant.label], found["deepspeed"], variant.label, noise
        )
        for variant in ours
    }


def measure(run: Run, plan: Plan, with_profile: bool) -> dict[str, Any]:
    """Warm an engine up and time it; return all figures. Collective."""
    device = torch.device(run.engine.device)
    is_cuda = device.type == "cuda"
    run.train(plan.warmup)
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    blocks = [run.time_block(plan.steps) for _ in range(plan.blocks)]
    found: dict[str, Any] = {"losses": run.mean_losses()}
    if is_cuda:
        free, total = torch.cuda.mem_get_info()
        peak, outside = torch.cuda.max_memory_allocated(), total - free
        memory = [[peak / GIB, (outside - torch.cuda.memory_reserved()) / GIB]]
        [[found["peak_gib"], found["outside_gib"]]] = slowest_rank(memory, device)
        if with_profile:
            profile = profile_step(lambda: run.train(1))
            found["profile"] = None if profile is None else asdict(profile)
    if plan.phases:
        found["phases_ms"] = run.time_phases()
    [found["blocks_ms"]] = slowest_rank([blocks], device)
    return found


def bench(
    example: ModuleType, work: Workload, variants: Sequence[Variant], plan: Plan
) -> dict[str, Any]:
    """Check and time all variants on one workload. Collective.

    Returns:
        the workload's values, ``checks`` and, by label, ``variants``.
    """
    checks = check_small_model(example, work, variants, plan.config)
    found: dict[str, list[dict[str, Any]]] = {variant.label: [] for variant in variants}
    for is_last in [False] * (plan.rounds - 1) + [True]:
        for variant in variants:
            run = Run(example, work, variant, plan.config, plan.num_steps)
            found[variant.label].append(measure(run, plan, with_profile=is_last))
            run.free()
    if "deepspeed" in found:
        theirs = found["deepspeed"][0]
        for label in checks:
            curve = check_training(found[label][0], theirs, label)
            checks[label] += f"; whole model: {curve}"
    flop = work.flop_per_token(example.NUM_BYTES) * work.num_tokens
    return {
        **asdict(work),
        "flop_per_step": flop,
        "checks": checks,
        "variants": {label: summarise(rounds, work, flop) for label, rounds in found.items()},
    }


def summarise(rounds: list[dict[str, Any]], work: Workload, flop: int) -> dict[str, Any]:
    """Return one variant's figures, from the figures of its rounds."""
    blocks = [ms for found in rounds for ms in found["blocks_ms"]]
    step_ms, last = statistics.median(blocks), rounds[-1]
    tflops = flop / step_ms / 1e9
    peak = device_peak_flops(torch.device("cuda")) if torch.cuda.is_available() else None
    summary = {
        "step_ms": step_ms,
        "min_ms": min(blocks),
        "max_ms": max(blocks),
        "blocks_ms": blocks,
        "tokens_per_s": 1e3 * work.num_tokens * dist.get_world_size() / step_ms,
        "tflops_per_gpu": tflops,
        "mfu": 1e12 * tflops / peak if peak else None,
        "losses": rounds[0]["losses"],
    }
    for key in ("peak_gib", "outside_gib"):
        if key in last:
            summary[key] = max(found[key] for found in rounds)
    if profile := last.get("profile"):
        summary["busy_share"] = min(profile["busy_ms"] / step_ms, 1.0)
    return summary | {key: last[key] for key in ("profile", "phases_ms") if last.get(key)}


def table(record: dict[str, Any], title: str) -> Iterator[str]:
    """Yield the lines to print of one workload."""
    yield f"\n{title}"
    for label, check in record["checks"].items():
        yield f"  {label} against deepspeed, relative differences: {check}"
    variants = record["variants"]
    width = max(map(len, variants))
    yield (
        f"  {'layer':{width}}  ms a step (min, max)       tokens/s  TFLOP/s   MFU  busy  activities"
        "  peak GiB  outside  loss"
    )
    for label, v in variants.items():
        spread, profile = f"({v['min_ms']:.1f}, {v['max_ms']:.1f})", v.get("profile")
        mfu = f"{v['mfu']:5.0%}" if v["mfu"] else "    -"
        busy, memory = "   -           -", "       -        -"
        if profile:
            busy = f"{v['busy_share']:4.0%} {profile['num_activities']:11,d}"
        if "peak_gib" in v:
            memory = f"{v['peak_gib']:8.1f} {v['outside_gib']:8.1f}"
        yield (
            f"  {label:{width}} {v['step_ms']:8.1f} {spread:18} {v['tokens_per_s']:10,.0f} "
            f"{v['tflops_per_gpu']:8.1f} {mfu}  {busy}  {memory}  "
            f"{v['losses'][0]:.3f} -> {v['losses'][-1]:.3f}"
        )
    for label, v in variants.items():
        if "profile" in v:
            kinds, span = v["profile"]["kinds_ms"], v["profile"]["span_ms"]
            yield f"  {label:{width}} rank 0, {span:.1f} ms under the profiler: {_times(kinds)}"
        if "phases_ms" in v:
            yield f"  {label:{width}} each waited for, ms: {_times(v['phases_ms'])}"


def _times(by_name: dict[str, float]) -> str:
    return ", ".join(f"{name} {ms:.1f}" for name, ms in by_name.items())


def ratios(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield, by workload, the throughput of the first variant of ours over the others'."""
    for record in records:
        rates = {label: v["tokens_per_s"] for label, v in record["variants"].items()}
        ours = next((label for label in rates if label.split(":")[0] == "comet_ds"), None)
        if ours is None or len(rates) < 2:
            continue
        others = ", ".join(
            f"{rates[ours] / rate:.2f} x {label}" for label, rate in rates.items() if label != ours
        )
        yield (
            f"{record['shape']}, ZeRO {record['zero']}, {record['micro_batches']} micro-batches: "
            f"tokens/s of {ours} are {others}"
        )
