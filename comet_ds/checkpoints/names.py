# SPDX-License-Identifier: Apache-2.0
"""Local and global names of experts' parameters, and the experts of each rank.

A local name numbers the experts of one rank, a global name those of all ranks. Worked example: with
4 experts on 2 ranks, a matrix of the third expert, the first of rank 1, has the names

    moe.deepspeed_moe.experts.deepspeed_experts.0.fc.weight     local, for example in param_shapes
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
    """Parts of the name of an expert's parameter: before the number, the number, after it."""

    layer: str
    expert: int
    rest: str

    def __str__(self) -> str:
        return f"{self.layer}{self.expert}.{self.rest}"


def parse(name: str) -> ExpertName | None:
    """Return the parts of a name, None if the parameter is not an expert's."""
    match = _EXPERT.fullmatch(name)
    return match and ExpertName(match["layer"], int(match["expert"]), match["rest"])


def renumber(name: str, offset: int) -> str:
    """Add an offset to the expert's number in a name; other names are returned unchanged."""
    parts = parse(name)
    return name if parts is None else str(parts._replace(expert=parts.expert + offset))


def count_experts(names: Iterable[str]) -> dict[str, int]:
    """Return the number of experts of a rank by layer, from the largest number in local names."""
    counts: dict[str, int] = {}
    for parts in map(parse, names):
        if parts is not None:
            counts[parts.layer] = max(counts.get(parts.layer, 0), parts.expert + 1)
    return counts


def resize(
    names: Sequence[str], old: Mapping[str, int], new: Mapping[str, int]
) -> list[tuple[str, str]]:
    """Return a rank's list of local names for another number of local experts.

    Args:
        names: local names; neighbours of one layer are ordered by expert, and every expert has the
            same parameters.
        old, new: number of local experts by layer.

    Returns:
        Pairs of a name and the name in ``names`` it was made from, that of expert 0.

    Raises:
        ValueError: the names of a layer are not ordered by expert.
    """
    found: list[tuple[str, str]] = []
    parsed = [(name, parse(name)) for name in names]
    for layer, run in itertools.groupby(parsed, lambda item: item[1] and item[1].layer):
        if layer is None:
            found += [(name, name) for name, _ in run]
            continue
        parts = [part for _, part in run if part is not None]
        template = [part for part in parts if part.expert == 0]
        expected = [t._replace(expert=i) for i in range(old[layer]) for t in template]
        if parts != expected:
            raise ValueError(
                f"the parameters of {layer}* must be ordered by expert, the same ones of each of "
                f"{old[layer]} local experts, got {', '.join(map(str, parts[:4]))}, ..."
            )
        found += [(str(t._replace(expert=i)), str(t)) for i in range(new[layer]) for t in template]
    return found


@dataclass(frozen=True)
class Topology:
    """The assignment of experts to ranks.

    Attributes:
        num_ranks: number of data parallel ranks.
        is_data_first: the setting "use_data_before_expert_parallelism". If True, ranks with the
            same experts are neighbours; if False, the ranks of an expert parallel group are.
    """

    num_ranks: int
    is_data_first: bool

    def ep_rank(self, rank: int, ep_size: int) -> int:
        """Return a rank's rank in its expert parallel group.

        Source: ``deepspeed/utils/groups.py``, _create_expert_and_data_parallel.
        """
        return rank // (self.num_ranks // ep_size) if self.is_data_first else rank % ep_size

    def expert_dp_rank(self, rank: int, ep_size: int) -> int:
        """Return a rank's index among the ranks with the same experts."""
        return rank % (self.num_ranks // ep_size) if self.is_data_first else rank // ep_size

    def writer(self, ep_rank: int, ep_size: int) -> int:
        """Return the first rank with the experts of an expert parallel rank; it writes them."""
        return ep_rank * (self.num_ranks // ep_size) if self.is_data_first else ep_rank
