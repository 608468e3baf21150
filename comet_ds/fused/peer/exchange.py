# SPDX-License-Identifier: Apache-2.0
"""What the ranks of an expert parallel group share: places in their memory, meetings on the GPU.

A rank's peers write routing tables and results into its block of memory, and tokens, unless they
read its own there (csrc/peer/exchange.cuh says when). All layers of a group share the blocks.
"""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from deepspeed import comm as dist

from comet_ds.config import CometConfig
from comet_ds.fused.peer.host_status import HostStatusExchange
from comet_ds.fused.peer.memory import GROWTH_BYTES, PeerMemory, SymmetricMemory, describe_link
from comet_ds.fused.refusal import Refusal
from comet_ds.kernels import Kernels, load_kernels, why_no_kernels
from comet_ds.tuning.cost_model import CtaSplit, LayerShape, choose_split
from comet_ds.tuning.online import RunTuner, Trial
from comet_ds.tuning.table import Origin, TuningTable, default_path, read

# Parts of a block start at multiples of this.
ALIGNMENT = 256
# What all ranks have to know of a rank's routing, by name: Source in csrc/rows/dispatch.h.
TABLES = ("topk_ids", "topk_weights", "slot_in_expert", "kept_counts")


@dataclass(frozen=True)
class CallShape:
    """What a forward exchanges; the same on all ranks.

    Attributes:
        num_tokens: tokens of every rank.
        top_k, num_experts: routes per token, experts of all ranks.
        token_bytes: bytes of an activation.
        is_pushed: whether all tokens are copied to all ranks; else ranks pull those they need.
    """

    num_tokens: tuple[int, ...]
    top_k: int
    num_experts: int
    token_bytes: int
    is_pushed: bool


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


class Layout(NamedTuple):
    """Where parts of a block lie, one behind the other.

    Attributes:
        offsets: of every part.
        size: of all.
    """

    offsets: dict[str, int]
    size: int

    @classmethod
    def of(cls, sizes: Mapping[str, int]) -> Layout:
        """Lay out parts of these sizes, in their order."""
        offsets, end = {}, 0
        for name, size in sizes.items():
            offsets[name] = end
            end += _aligned(size)
        return cls(offsets, end)


class Parts(NamedTuple):
    """Where everything lies that the ranks exchange in a call.

    Attributes:
        call: what they exchange.
        addresses: of every part, by rank.
        place_bytes: of a place, where a part has one for each other rank.
    """

    call: CallShape
    addresses: dict[str, list[int]]
    place_bytes: dict[str, int]

    def place(self, name: str, reader: int, writer: int) -> int:
        """Return the address at which a rank finds what another has sent it."""
        distance = (writer - reader) % len(self.call.num_tokens)
        return self.addresses[name][reader] + (distance - 1) * self.place_bytes[name]

    def places(self, name: str, reader: int) -> list[int]:
        """Return the addresses at which a rank reads what other ranks have, by rank; 0 its own."""
        found = self.addresses[name]
        if name == "tokens" and not self.call.is_pushed:
            return [address if rank != reader else 0 for rank, address in enumerate(found)]
        ranks = range(len(found))
        return [self.place(name, reader, rank) if rank != reader else 0 for rank in ranks]


class ExposureMeter:
    """What communication takes from computation in a layer's calls, measured by the kernels.

    Counted are CTAs that communicate beside a GEMM and do not compute, and meetings; not tiles that
    wait for rows, publishing, the wait for sent tokens and their dispatch, the last sum, nor what
    frozen experts push without a GEMM beside it.

    Args:
        device: of the rank.
    """

    DIRECTIONS = ("forward", "backward")

    def __init__(self, device: torch.device) -> None:
        self._exposures = torch.zeros(2, 2, dtype=torch.int64, device=device)  # csrc's Exposure
        self._num_calls = [0, 0]

    def begin(self, direction: int) -> int:
        """Count a call, 0 forward or 1 backward; return the address of its ``Exposure``.

        0 while a CUDA graph is captured, which would add to the memory long after the meter's end.
        """
        if self._exposures.is_cuda and torch.cuda.is_current_stream_capturing():
            return 0
        self._num_calls[direction] += 1
        return self._exposures[direction].data_ptr()

    def read(self, num_sms: int) -> dict[str, float]:
        """Return the mean ms of a call by direction, of those that had any; waits."""
        parts = zip(self.DIRECTIONS, self._exposures.tolist(), self._num_calls, strict=True)
        return {
            name: (communicating / num_sms + meeting) / calls / 1e6
            for name, (communicating, meeting), calls in parts
            if calls
        }


class Exchange:
    """The meetings of one group, and where in its memory things lie.

    Args:
        memory: the group's.
        kernels: the compiled kernels.
        host_status: the group's; None where the caller knows the number of tokens of every rank.
        timeout_s: how long to wait for another rank on the GPU.
        table: CTA splits that were measured.
        tuner: measures points that are not in the table in this run.
        origin: what measured points belong to, this rank's GPU unless given.

    Attributes:
        timeout_s, timeout_ns: how long to wait on the GPU.
        late: [2] int64; ``LateWait`` of csrc/peer/exchange.h.
        table: CTA splits that were measured.
        cta_split: points for all layers, in place of those and the cost model's.
        has_copy_engines: whether they send tokens; else a kernel does.
        streams: PeerStreams of csrc/autograd/experts_autograd.h.
        origin: what measured points belong to.
    """

    def __init__(
        self,
        memory: PeerMemory,
        kernels: Kernels,
        host_status: HostStatusExchange | None = None,
        timeout_s: float = 600,
        table: TuningTable | None = None,
        tuner: RunTuner | None = None,
        origin: Origin | None = None,
    ) -> None:
        self.memory, self.kernels, self.host_status, self.tuner = (
            memory,
            kernels,
            host_status,
            tuner,
        )
        self.table = table or TuningTable()
        self.origin = origin or _origin(memory.block.device, kernels)
        self.timeout_s, self.timeout_ns = timeout_s, int(timeout_s * 1e9)
        # How often this rank has come to a meeting; what a GEMM's communication waited for in vain.
        state = torch.zeros(3, dtype=torch.int64, device=memory.block.device)
        self._epoch, self.late = state[:1], state[1:]
        self.cta_split: CtaSplit | None = None
        self.has_copy_engines = True
        self.streams = kernels.PeerStreams()
        self._used = [0, 0]  # bytes of the block, from its start and from its end
        self._parts = functools.lru_cache(maxsize=64)(self._lay_out)
        self._choose = functools.lru_cache(maxsize=256)(self._look_up)

    @property
    def generation(self) -> int:
        """How often the blocks have moved; places of before are not valid any more."""
        return self.streams.generation

    def trial(self, shape: LayerShape, has_backward: bool) -> Trial:
        """Return the CTA splits of a layer's forward: measured ones, else the cost model's.

        Collective at times, where a tuner measures.
        """
        cta_split, is_measured = self._choose(shape)
        if self.cta_split is not None:
            return Trial(self.cta_split)
        if self.tuner is not None and not is_measured:
            return self.tuner.trial(shape, has_backward)
        return Trial(cta_split)

    def _look_up(self, shape: LayerShape) -> tuple[CtaSplit, bool]:
        """Return a layer's points, and whether they are in the table."""
        found = self.table.find(shape, self.origin)
        return found or choose_split(shape), found is not None

    def parts(self, call: CallShape) -> Parts:
        """Return where a call's parts lie in the ranks' blocks, which may have to grow: collective.

        Parts: ``flags``, ``slots``, ``grad_weights``, ``topk_ids``, ``topk_weights``,
        ``slot_in_expert``, ``kept_counts``, ``tokens``, as ``Source`` in csrc/rows/dispatch.h has
        them. Each of the last five has a place for what arrives from the rank at distance 1, the
        rank at distance 2 and so on, with room for the most tokens any rank has; ``tokens`` that
        are pulled has one place, for this rank's own.

        These five lie at the end of the block, where no call keeps anything else: they arrive while
        the receiver may still read the other parts of the call before.
        """
        lasting, incoming, place_bytes = self._parts(call)
        used = [max(self._used[0], lasting.size), max(self._used[1], incoming.size)]
        block = self.memory.block
        self.memory.is_captured |= self.streams.is_captured
        self.memory.reserve(sum(used))
        self.streams.generation += self.memory.block is not block
        self._used = used
        begin = self.memory.block.numel() - incoming.size
        offsets = lasting.offsets | {name: begin + at for name, at in incoming.offsets.items()}
        bases = self.memory.addresses
        addresses = {name: [base + at for base in bases] for name, at in offsets.items()}
        return Parts(call, addresses, place_bytes)

    @staticmethod
    def _lay_out(call: CallShape) -> tuple[Layout, Layout, dict[str, int]]:
        """Return the parts from a block's start, those up to its end, and sizes of their places."""
        num_tokens, num_ranks = max(call.num_tokens), len(call.num_tokens)
        routes = num_tokens * call.top_k
        lasting = {
            "flags": 8 * num_ranks,
            "grad_weights": 4 * routes,
            "slots": min(call.top_k, num_ranks - 1) * num_tokens * call.token_bytes,
        }
        incoming = {
            "kept_counts": 4 * call.num_experts,
            "topk_ids": 8 * routes,
            "topk_weights": 4 * routes,
            "slot_in_expert": 4 * routes,
            "tokens": num_tokens * call.token_bytes,
        }
        place_bytes = {name: _aligned(size) for name, size in incoming.items()}
        sizes = {name: (num_ranks - 1) * size for name, size in place_bytes.items()}
        if not call.is_pushed:
            sizes["tokens"] = place_bytes["tokens"]
        return Layout.of(lasting), Layout.of(sizes), place_bytes

    def places(self, call: CallShape) -> dict[str, Any]:
        """Return the arguments of LayerCall that say where a call's parts lie: by ``parts``.

        Collective where the blocks have to grow.
        """
        parts, rank = self.parts(call), self.memory.rank
        columns = [parts.places(name, rank) for name in (*TABLES, "tokens")]
        columns += [parts.addresses["slots"], parts.addresses["grad_weights"]]
        receivers = [(rank + i) % len(call.num_tokens) for i in range(1, len(call.num_tokens))]
        sent = (*TABLES, "tokens") if call.is_pushed else TABLES
        return {
            "sources": list(zip(*columns, strict=True)),
            "published": 0 if call.is_pushed else parts.addresses["tokens"][rank],
            "flags": parts.addresses["flags"],
            **{name: [parts.place(name, to, rank) for to in receivers] for name in sent},
            "epoch": self._epoch.data_ptr(),
            "late": self.late.data_ptr(),
            "timeout_ns": self.timeout_ns,
            "has_copy_engines": self.has_copy_engines,
        }


# One a process group, as long as it lives: all layers of a group share its memory.
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
    tuner, first = None, facts[0]  # all ranks find the same points
    if config.refine:
        tuner = RunTuner(group, first["origin"], _table_path(config))
    table = TuningTable(first["entries"])
    arguments = (host_status, config.timeout_s, table, tuner, first["origin"])
    return Exchange(memory, kernels, *arguments)


def _origin(device: torch.device, kernels: Kernels) -> Origin:
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
        "origin": _origin(device, kernels) if is_first and kernels else None,
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
