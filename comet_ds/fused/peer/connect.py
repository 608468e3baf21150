# SPDX-License-Identifier: Apache-2.0
"""Setting up what the ranks of a group exchange tokens by, once for all its layers."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from deepspeed import comm as dist

from comet_ds.config import CometConfig
from comet_ds.fused.peer.exchange import Exchange
from comet_ds.fused.peer.host_status import HostStatusExchange
from comet_ds.fused.peer.memory import GROWTH_BYTES, SymmetricMemory, describe_link
from comet_ds.fused.refusal import Refusal
from comet_ds.kernels import Kernels, load_kernels, why_no_kernels
from comet_ds.tuning.online import RunTuner
from comet_ds.tuning.policy import SplitPolicy
from comet_ds.tuning.table import Origin, TuningTable, default_path, read

# One for each process group, for as long as the group lives: its layers share the memory.
_exchanges: WeakKeyDictionary[Any, Exchange | Refusal] = WeakKeyDictionary()


def connect(group: Any, device: torch.device, config: CometConfig) -> Exchange | Refusal:
    """Return the exchange of a group, or why it has none: the same on all ranks.

    Collective over the group in the first call.

    Raises:
        RuntimeError: the first call comes while a CUDA graph is captured.
        ValueError: another layer of the group has another timeout.
    """
    if group not in _exchanges:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("run the layer once before a CUDA graph captures it")
        _exchanges[group] = _connect(group, device, config)
    found = _exchanges[group]
    if isinstance(found, Exchange) and found.timeout_s != config.timeout_s:
        raise ValueError(
            f"timeout_s must be the same for all layers of an expert parallel group, got "
            f"{found.timeout_s:g} and {config.timeout_s:g}"
        )
    return found


def exchange_of(group: Any) -> Exchange:
    """Return the exchange of a group that has one."""
    found = _exchanges[group]
    assert isinstance(found, Exchange), found
    return found


def _connect(group: Any, device: torch.device, config: CometConfig) -> Exchange | Refusal:
    kernels = load_kernels(device)
    facts: list[Any] = [None] * dist.get_world_size(group=group)
    own = _own_facts(device, config, kernels, dist.get_rank(group=group) == 0)
    torch.distributed.all_gather_object(facts, own, group=group)
    if reason := _why_not_connected(facts, kernels.max_ranks if kernels else 0):
        return Refusal(reason)
    assert kernels is not None, "without kernels, that is the reason"
    try:
        memory = SymmetricMemory(group, device)
        memory.reserve(GROWTH_BYTES)
        host_status = HostStatusExchange(group, config.timeout_s)
    except RuntimeError as error:  # the same on all ranks
        return Refusal(str(error))
    tuner, first = None, facts[0]  # so that all ranks choose the same
    if config.refine:
        tuner = RunTuner(group, first["origin"], _table_path(config))
    policy = SplitPolicy(first["origin"], TuningTable(first["entries"]), tuner)
    return Exchange(memory, kernels, policy, host_status, config.timeout_s)


def origin_of(device: torch.device, kernels: Kernels) -> Origin:
    """Return what measurements on this rank's GPU belong to: GPU, link and kernels."""
    return Origin(torch.cuda.get_device_name(device), describe_link(), kernels.fingerprint)


def _table_path(config: CometConfig) -> Path:
    return Path(config.tuning_table or default_path())


def _own_facts(
    device: torch.device, config: CometConfig, kernels: Kernels | None, is_first: bool
) -> dict[str, Any]:
    """Return what the ranks of a group have to know of each other."""
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    names = [str(found.uuid) for found in properties]
    own = torch.cuda.current_device() if device.index is None else device.index
    return {
        "rank": dist.get_rank(),
        "host": _host(),
        "device": names[own],
        "model": f"{properties[own].name}, {properties[own].multi_processor_count} SMs",
        "out of reach": [
            name
            for i, name in enumerate(names)
            if i != own and not torch.cuda.can_device_access_peer(own, i)
        ],
        "reason": why_no_kernels() and f"it has no kernels: {why_no_kernels()}",
        "entries": read(_table_path(config)) if is_first else [],
        "origin": origin_of(device, kernels) if is_first and kernels else None,
    }


def _host() -> tuple[str, ...]:
    """Return what is equal for processes that share a machine, its processes and /dev/shm."""
    boot, processes = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    shared = Path("/dev/shm")
    return (
        socket.gethostname(),
        boot.read_text().strip() if boot.exists() else "",
        os.readlink(processes) if processes.exists() else "",
        str(shared.stat().st_dev) if shared.exists() else "",
    )


def _why_not_connected(facts: Sequence[dict[str, Any]], max_ranks: int) -> str | None:
    first = facts[0]
    for fact in facts:
        if fact["reason"] is not None:
            return f"rank {fact['rank']}: {fact['reason']}"
        if fact["host"] != first["host"]:
            return (
                "its ranks must share a host, its processes and /dev/shm, rank "
                f"{first['rank']} has {first['host']}, rank {fact['rank']} {fact['host']}"
            )
        for other in facts:
            if other["device"] in fact["out of reach"]:
                ranks = f"{fact['rank']} cannot address the memory of rank {other['rank']}"
                return f"the GPU of rank {ranks}'s"
        if fact["model"] != first["model"]:  # they choose how tokens come each for itself, alike
            return (
                f"its ranks must have GPUs of one model, rank {first['rank']} has "
                f"{first['model']}, rank {fact['rank']} {fact['model']}"
            )
    if len({fact["device"] for fact in facts}) < len(facts):
        return "its ranks must have a GPU each, two have the same one"
    if len(facts) > max_ranks:
        return f"it takes at most {max_ranks} ranks, ep_size is {len(facts)}"
    return None
