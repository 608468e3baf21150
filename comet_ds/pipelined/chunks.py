# SPDX-License-Identifier: Apache-2.0
"""How many chunks a layer's rows are cut into on the pipelined path."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.moe.experts import Experts
from torch import Tensor

from comet_ds.config import CometConfig
from comet_ds.gate.topk_gate import TopKGate
from comet_ds.pipelined.plan import ChunkSchedule
from comet_ds.ranks.setup import agree_on_largest
from comet_ds.tuning.cost_model import ChunkedLayer
from comet_ds.tuning.hardware import H200
from comet_ds.validation import InputRules


class ChunkChoice:
    """The chunks of a layer: those of the configuration, or the cost model's.

    Args:
        config: the layer's options.
        ep_size: W.
        num_local_experts: experts of a rank.
        gate, experts: the layer's, as they stand there now.
    """

    def __init__(
        self,
        config: CometConfig,
        ep_size: int,
        num_local_experts: int,
        gate: TopKGate,
        experts: Experts,
    ) -> None:
        self.config, self.ep_size, self.num_local_experts = config, ep_size, num_local_experts
        self.gate, self.experts = gate, experts
        self._chosen: tuple[torch.device, ChunkSchedule, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Forget in copies: their ranks agree anew."""
        return {**self.__dict__, "_chosen": None}

    def schedule(
        self, num_tokens: int, group: Any, rules: InputRules
    ) -> tuple[ChunkSchedule, Tensor]:
        """Return the schedule, and its segment table on the layer's device.

        Collective in the first call, whose largest number of tokens decides.

        Args:
            num_tokens: T of this rank.
            group: expert parallel group.
            rules: the layer's device and hidden size.
        """
        device = rules.device
        if self._chosen is None or self._chosen[0] != device:
            num_chunks = self._num_chunks(num_tokens, group, rules)
            schedule = ChunkSchedule(self.ep_size, self.num_local_experts, num_chunks)
            self._chosen = device, schedule, schedule.segment_of_expert.to(device)
        return self._chosen[1:]

    def _num_chunks(self, num_tokens: int, group: Any, rules: InputRules) -> int:
        if self.ep_size == 1:
            return 1
        if self.config.num_chunks != "auto":
            return self.config.num_chunks
        device = rules.device
        if device.type != "cuda":  # the cores that would communicate are computing
            return 1
        rows = agree_on_largest(num_tokens, group, device) * getattr(self.gate, "k", 1)
        params = [p for p in self.experts.parameters() if p.is_floating_point()]
        numel = sum(p.numel() for p in params) / self.num_local_experts
        seconds = 2 * rows * numel / H200.grouped_mm_flops
        token_bytes = rules.hidden * (params[0].element_size() if params else 2)
        domain = torch.cuda.device_count()  # of this host, others may have more
        layer = ChunkedLayer(rows, token_bytes, (seconds, 2 * seconds), self.ep_size, domain)
        return agree_on_largest(layer.best(), group, device)
