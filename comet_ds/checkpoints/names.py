# SPDX-License-Identifier: Apache-2.0
"""Names of experts' parameters: counted on one rank, or over all ranks.

Of 4 experts on 2 ranks, rank 1 calls the third one's matrix

    moe.deepspeed_moe.experts.deepspeed_experts.0.fc.weight     local, in param_shapes for instance
    moe.deepspeed_moe.experts.deepspeed_experts.2.fc.weight     global, in the experts' files
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

_EXPERT = re.compile(r"(?P<layer>(?:.*\.)?deepspeed_moe\.experts\.deepspeed_experts\.)"
                     r"(?P<expert>\d+)\.(?P<rest>.+)")  # fmt: skip


class ExpertName(NamedTuple):
    """Parts of the name of an expert's parameter; ``layer`` and ``rest`` are around the number."""

    layer: str
    expert: int
    rest: str

    def __str__(self) -> str:
        return f"{self.layer}{self.expert}.{self.rest}"


def parse(name: str) -> ExpertName | None:
    """Return the parts of a name; None for what is no expert's."""
    match = _EXPERT.fullmatch(name)
    return match and ExpertName(match["layer"], int(match["expert"]), match["rest"])


def renumber(name: str, offset: int) -> str:
    """Add to the number of an expert; other names stay."""
    parts = parse(name)
    return name if parts is None else str(parts._replace(expert=parts.expert + offset))


def count_experts(names: Iterable[str]) -> dict[str, int]:
    """Return by layer how many experts a rank has, by the largest number in local names."""
    counts: dict[str, int] = {}
    for parts in map(parse, names):
        if parts is not None:
            counts[parts.layer] = max(counts.get(parts.layer, 0), parts.expert + 1)
    return counts


def resize(
    names: Sequence[str], old: Mapping[str, int], new: Mapping[str, int]
) -> list[tuple[str, str]]:
    """Return a rank's list of local names for other numbers of local experts.

    Args:
        names: neighbours of one layer come expert by expert, each with the same names.
        old, new: local experts by layer.

    Returns:
        Each name with the one it was made from, that of expert 0.

    Raises:
        ValueError: the names of a layer do not come expert by expert.
    """
    found: list[tuple[str, str]] = []
    parsed = [(name, parse(name)) for name in names]
    for layer, run in itertools.groupby(parsed, lambda item: item[1] and item[1].layer):
        if layer is None:
            found += [(name, name) for name, _ in run]
            continue
        parts = [part for _, part in run]
        template = [part for part in parts if part.expert == 0]
        expected = [t._replace(expert=i) for i in range(old[layer]) for t in template]
        if parts != expected:
            raise ValueError(
                f"the parameters of {layer}* must come expert by expert, the same ones of each of "
                f"{old[layer]} local experts, got {', '.join(map(str, parts[:4]))}, ..."
            )
        found += [(str(t._replace(expert=i)), str(t)) for i in range(new[layer]) for t in template]
    return found


@dataclass(frozen=True)
class Topology:
    """Which experts a rank has.

    Attributes:
        num_ranks: data parallel ranks.
        is_data_first: "use_data_before_expert_parallelism": an expert parallel group's ranks are
            not neighbours, those with the same experts are.
    """

    num_ranks: int
    is_data_first: bool

    def ep_rank(self, rank: int, ep_size: int) -> int:
        """Return a rank's number in its expert parallel group.

        Source: ``deepspeed/utils/groups.py``, _create_expert_and_data_parallel.
        """
        return rank // (self.num_ranks // ep_size) if self.is_data_first else rank % ep_size

    def expert_dp_rank(self, rank: int, ep_size: int) -> int:
        """Return a rank's number among those with the same experts."""
        return rank % (self.num_ranks // ep_size) if self.is_data_first else rank // ep_size

    def writer(self, ep_rank: int, ep_size: int) -> int:
        """Return the first rank with the experts of an expert parallel rank."""
        return ep_rank * (self.num_ranks // ep_size) if self.is_data_first else ep_rank
