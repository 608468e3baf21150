# SPDX-License-Identifier: Apache-2.0
"""A model parallel unit, as DeepSpeed asks for it, of tensor parallel pairs of ranks."""

from __future__ import annotations

from typing import Any

from deepspeed import comm as dist


class PairsMpu:
    """Ranks 0 and 1, 2 and 3, ... are tensor parallel groups; constructed by all ranks alike.

    Args:
        rank: of this process.
        size: number of ranks, a multiple of 2.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.num_pairs = rank, size // 2
        pairs = [dist.new_group([first, first + 1]) for first in range(0, size, 2)]
        columns = [dist.new_group(list(range(first, size, 2))) for first in range(2)]
        self.tp_group, self.dp_group = pairs[rank // 2], columns[rank % 2]

    def get_tensor_model_parallel_rank(self) -> int:
        return self.rank % 2

    def get_tensor_model_parallel_world_size(self) -> int:
        return 2

    def get_tensor_model_parallel_group(self) -> Any:
        return self.tp_group

    get_model_parallel_rank = get_tensor_model_parallel_rank
    get_model_parallel_world_size = get_tensor_model_parallel_world_size
    get_model_parallel_group = get_tensor_model_parallel_group

    def get_data_parallel_world_size(self) -> int:
        return self.num_pairs

    def get_data_parallel_rank(self) -> int:
        return self.rank // 2

    def get_data_parallel_group(self) -> Any:
        return self.dp_group
