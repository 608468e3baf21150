# SPDX-License-Identifier: Apache-2.0
"""Which path a forward takes: the same on all ranks of its expert parallel group."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from deepspeed.utils import groups
from deepspeed.utils.bwc import bwc_tensor_model_parallel_world_size

from comet_ds.config import CometConfig
from comet_ds.fused.peer.exchange import Exchange, connect
from comet_ds.fused.peer.host_status import RankStatus
from comet_ds.gate.topk_gate import TopKGate
from comet_ds.ranks.gradients import BackwardNeeds
from comet_ds.validation import InputRules

# Where memory is reserved for all tokens on one rank, "auto" takes so many times the even share.
MAX_SLACK = 2


class Decision(NamedTuple):
    """What a forward does.

    Attributes:
        path: "reference", "pipelined" or "fused".
        why_not_fused: why not, where the configuration leaves it open.
        num_tokens: of every rank of the group, where the ranks have decided together.
        needs: gradients that any of them needs; None where there is but one.
    """

    path: str
    why_not_fused: str | None = None
    num_tokens: tuple[int, ...] = ()
    needs: BackwardNeeds | None = None


class PathChoice:
    """The decisions of one layer.

    Args:
        config: its options.
        ep_size: W.
        num_local_experts: experts of a rank.
        gate: the layer's, as it stands there now.
    """

    def __init__(
        self, config: CometConfig, ep_size: int, num_local_experts: int, gate: TopKGate
    ) -> None:
        self.config, self.ep_size = config, ep_size
        self.num_local_experts, self.gate = num_local_experts, gate
        self._connected: tuple[Any, torch.device, Exchange] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out of copies what belongs to this process."""
        return {**self.__dict__, "_connected": None}

    def connect(self, group: Any, rules: InputRules) -> Exchange | str | None:
        """Return what the fused path exchanges tokens by, or why it cannot run on this group.

        None where it is not asked for or has nothing to exchange. Collective over the group in its
        first call.

        Raises:
            RuntimeError: "fused" is pinned and cannot run.
        """
        if self.config.path in ("reference", "pipelined"):
            return None
        if self._connected is not None and groups.mpu is None:
            own_group, device, exchange = self._connected
            if own_group is group and device == rules.device and self._can_be_fused():
                return exchange
        tp_size = bwc_tensor_model_parallel_world_size(groups.mpu)
        if tp_size > 1:
            found = f"it needs whole experts and tokens, tensor parallel size is {tp_size}"
        elif rules.device.type != "cuda":
            found = f"it needs a CUDA device, not {rules.device.type}"
        elif self.ep_size == 1:
            return None
        elif not self._can_be_fused():
            found = (
                f"without dropping it reserves {self.ep_size} times the memory an even routing "
                'needs, which only "path": "fused" asks for'
            )
        else:
            with torch.cuda.device(rules.device):
                found = connect(group, rules.device, self.config)
            if isinstance(found, Exchange):
                reason = self._why_too_large(found.kernels)
                if reason is None:
                    self._connected = group, rules.device, found
                found = reason or found
        if isinstance(found, str):
            self._check_pin(found)
        return found

    def choose(
        self,
        why_not: Callable[[], str | None],
        needs: Callable[[], int],
        num_tokens: int,
        exchange: Exchange | str | None,
        rules: InputRules,
    ) -> Decision:
        """Decide for a forward with a valid input.

        Args:
            why_not: says why this rank's experts cannot take the fused path with its input.
            needs: says which gradients this rank needs, see ``find_needs``; called where it takes
                the fused path with others.
            num_tokens: T.
            exchange: what ``connect`` has returned.
            rules: for what another rank's input may break.

        Raises:
            RuntimeError: "fused" is pinned and cannot run.
            ValueError: another rank's input breaks a rule.
        """
        if self.config.path in ("reference", "pipelined"):
            return Decision(self.config.path)
        reason = exchange if isinstance(exchange, str) else why_not()
        answers: list[RankStatus] = []
        agreed = None
        if isinstance(exchange, Exchange):
            own_needs = needs() if reason is None else 0
            mine = RankStatus(num_tokens, reason is None, (rules.OK, 0), own_needs)
            answers = exchange.host_status.exchange(mine)
            rules.raise_first([answer.fault for answer in answers])
            agreed = BackwardNeeds.agree([answer.needs for answer in answers])
            refusing = [rank for rank, answer in enumerate(answers) if not answer.can_fuse]
            if refusing and reason is None:
                reason = f"rank {refusing[0]} of the expert parallel group cannot"
        if reason is None:
            num_tokens_of_ranks = tuple(answer.num_tokens for answer in answers)
            return Decision("fused", None, num_tokens_of_ranks, agreed)
        self._check_pin(reason)
        return Decision("pipelined", reason)

    def _can_be_fused(self) -> bool:
        """Whether "auto" may reserve the memory that the fused path needs without dropping."""
        if self.config.path == "fused" or self.ep_size <= MAX_SLACK:
            return True
        return getattr(self.gate, "drop_tokens", True)

    def _why_too_large(self, kernels: ModuleType) -> str | None:
        top_k = getattr(self.gate, "k", 1)
        if top_k > kernels.max_top_k:
            return f"it takes at most {kernels.max_top_k} routes, k is {top_k}"
        if not kernels.can_plan(self.num_local_experts, self.ep_size):
            return (
                f"a plan has no room for {self.num_local_experts} experts on {self.ep_size} ranks"
            )
        return None

    def _check_pin(self, reason: str) -> None:
        if self.config.path == "fused":
            raise RuntimeError(f'path "fused" is pinned and cannot run: {reason}')
