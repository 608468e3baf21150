# SPDX-License-Identifier: Apache-2.0
"""How many chunks the pipelined path cuts a layer's rows into."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from comet_ds.config import CometConfig
from comet_ds.pipelined.plan import ChunkSchedule
from comet_ds.ranks.setup import agree_on_largest
from comet_ds.tuning.cost_model import ChunkedLayer
from comet_ds.tuning.hardware import H200
from comet_ds.validation import InputRules


class ChunkChoice:
    """Chooses a layer's number of chunks: the configured one, or the cost model's.

    Args:
        config: the layer's options.
        ep_size: ranks of the expert parallel group.
        num_local_experts: experts of a rank.
        gate: the layer's gate; read for ``k``.
        experts: the layer's experts; read for the size of their parameters.
    """

    def __init__(
        self,
        config: CometConfig,
        ep_size: int,
        num_local_experts: int,
        gate: nn.Module,
        experts: nn.Module,
    ) -> None:
        self.config, self.ep_size, self.num_local_experts = config, ep_size, num_local_experts
        self.gate, self.experts = gate, experts
        self._chosen: tuple[torch.device, ChunkSchedule, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the choice out of copies: a copied layer agrees on its own."""
        return {**self.__dict__, "_chosen": None}

    def schedule(
        self, num_tokens: int, group: Any, rules: InputRules
    ) -> tuple[ChunkSchedule, Tensor]:
        """Return the chunk schedule; choose it in the first call.

        With "num_chunks": "auto" on CUDA the first call is collective and waits for the device; the
        largest number of tokens of all ranks decides. Later calls return the same schedule.

        Args:
            num_tokens: T of this rank.
            group: expert parallel group.
            rules: the layer's device and hidden size.

        Returns:
            The schedule, and its ``segment_of_expert`` on the layer's device.
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
        if device.type != "cuda":  # on the CPU communication and experts share the cores
            return 1
        num_rows = agree_on_largest(num_tokens, group, device) * getattr(self.gate, "k", 1)
        params = [p for p in self.experts.parameters() if p.is_floating_point()]
        numel = sum(p.numel() for p in params) / self.num_local_experts
        forward_s = 2 * num_rows * numel / H200.grouped_mm_flops
        token_bytes = rules.hidden * (params[0].element_size() if params else 2)
        domain = torch.cuda.device_count()  # hosts may differ: the ranks take the largest result
        times_s = (forward_s, 2 * forward_s)
        layer = ChunkedLayer(num_rows, token_bytes, times_s, self.ep_size, domain)
        return agree_on_largest(layer.best(), group, device)
