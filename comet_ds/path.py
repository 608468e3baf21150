# SPDX-License-Identifier: Apache-2.0
"""Which path a forward takes: the same on all ranks of its expert parallel group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.utils import groups
from torch import nn

from comet_ds.config import CometConfig
from comet_ds.fused.peer.connect import connect
from comet_ds.fused.peer.exchange import Exchange
from comet_ds.fused.peer.host_status import RankStatus
from comet_ds.fused.refusal import Refusal
from comet_ds.fused.weights import ExpertWeights
from comet_ds.kernels import Kernels
from comet_ds.ranks.gradients import BackwardNeeds
from comet_ds.tensor_parallel import has_tensor_parallel_experts
from comet_ds.validation import InputRules


@dataclass(frozen=True)
class TakeFused:
    """The decision for the fused path.

    Attributes:
        weights: the experts'.
        num_tokens: T of every rank of the group.
        needs: gradients that any rank needs; None on a single rank.
    """

    weights: ExpertWeights
    num_tokens: tuple[int, ...]
    needs: BackwardNeeds | None = None


@dataclass(frozen=True)
class TakeOther:
    """The decision for another path.

    Attributes:
        path: "reference" or "pipelined".
        why_not_fused: where the configuration leaves the fused path open.
    """

    path: str
    why_not_fused: str | None = None


class PathChoice:
    """The decisions of one layer.

    Args:
        config: its options.
        ep_size: W.
        num_local_experts: experts of a rank.
        gate: the layer's, as it stands there now.
    """

    def __init__(
        self, config: CometConfig, ep_size: int, num_local_experts: int, gate: nn.Module
    ) -> None:
        self.config, self.ep_size = config, ep_size
        self.num_local_experts, self.gate = num_local_experts, gate
        self._connected: tuple[Any, torch.device, Exchange] | None = None
        # What the ranks said last and what followed: most forwards are like the one before.
        self._last_fused: tuple[Any, TakeFused] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out of copies what belongs to this process."""
        return {**self.__dict__, "_connected": None, "_last_fused": None}

    @property
    def may_fuse(self) -> bool:
        """Whether the configuration leaves the fused path open."""
        return self.config.path in ("auto", "fused")

    def connect(self, group: Any, device: torch.device) -> Exchange | Refusal | None:
        """Return how ranks exchange tokens on the fused path, or why it cannot run on this group.

        None where it is not asked for or has nothing to exchange. Collective over the group in its
        first call.

        Args:
            group: expert parallel group.
            device: the layer's.

        Raises:
            RuntimeError: "fused" is pinned and cannot run.
        """
        if not self.may_fuse:
            return None
        if self._connected is not None and groups.mpu is None:
            own_group, own_device, exchange = self._connected
            if own_group is group and own_device == device:
                return exchange
        found = self._try_to_connect(group, device)
        if isinstance(found, Exchange):
            self._connected = group, device, found
        elif found is not None:
            self._check_pin(found)
        return found

    def _try_to_connect(self, group: Any, device: torch.device) -> Exchange | Refusal | None:
        if has_tensor_parallel_experts():
            return Refusal("it needs whole experts, and these are tensor parallel")
        if device.type != "cuda":
            return Refusal(f"it needs a CUDA device, not {device.type}")
        if self.ep_size == 1:
            return None
        with torch.cuda.device(device):
            found = connect(group, device, self.config)
        if isinstance(found, Exchange):
            return self._check_size(found.kernels) or found
        return found

    def choose(
        self,
        weights: ExpertWeights | Refusal,
        needs: Callable[[ExpertWeights], int],
        num_tokens: int,
        exchange: Exchange | Refusal | None,
        rules: InputRules,
    ) -> TakeFused | TakeOther:
        """Decide for a forward with a valid input.

        Args:
            weights: of this rank's experts, or why they cannot take the fused path with its input.
            needs: says which gradients this rank needs, see ``find_needs``; called where it takes
                the fused path with others.
            num_tokens: T.
            exchange: what ``connect`` has returned.
            rules: for what another rank's input may break.

        Raises:
            RuntimeError: "fused" is pinned and cannot run.
            ValueError: another rank's input breaks a rule.
        """
        if not self.may_fuse:
            return TakeOther(self.config.path)
        if isinstance(exchange, Refusal):
            weights = exchange
        if isinstance(exchange, Exchange):
            can_fuse = not isinstance(weights, Refusal)
            own_needs = 0 if isinstance(weights, Refusal) else needs(weights)
            mine = RankStatus(num_tokens, can_fuse, (rules.OK, 0), own_needs)
            assert exchange.host_status is not None, "connect() makes one"
            statuses = exchange.host_status.exchange(mine)
            if self._last_fused is not None:
                last_statuses, decision = self._last_fused
                if statuses is last_statuses and weights is decision.weights:
                    return decision
            rules.raise_first([status.fault for status in statuses])
            for rank, status in enumerate(statuses):
                if not status.can_fuse and not isinstance(weights, Refusal):
                    weights = Refusal(f"rank {rank} of the expert parallel group cannot")
            if not isinstance(weights, Refusal):
                all_tokens = tuple(status.num_tokens for status in statuses)
                agreed = BackwardNeeds.agree([status.needs for status in statuses])
                decision = TakeFused(weights, all_tokens, agreed)
                self._last_fused = statuses, decision
                return decision
        elif not isinstance(weights, Refusal):
            return TakeFused(weights, (num_tokens,))
        self._check_pin(weights)
        return TakeOther("pipelined", weights.reason)

    def _check_size(self, kernels: Kernels) -> Refusal | None:
        top_k = getattr(self.gate, "k", 1)
        if top_k > kernels.max_top_k:
            return Refusal(f"it takes at most {kernels.max_top_k} routes, k is {top_k}")
        if not kernels.can_plan(self.num_local_experts, self.ep_size):
            sizes = f"{self.num_local_experts} experts on {self.ep_size} ranks"
            return Refusal(f"a plan has no room for {sizes}")
        return None

    def _check_pin(self, refusal: Refusal) -> None:
        if self.config.path == "fused":
            raise RuntimeError(f'path "fused" is pinned and cannot run: {refusal.reason}')
