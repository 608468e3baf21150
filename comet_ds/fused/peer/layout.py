# SPDX-License-Identifier: Apache-2.0
"""Where the parts of a call lie in the ranks' memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

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
    """Where the parts of a block lie, one behind the other.

    Attributes:
        offsets: offset of every part in bytes, by name.
        size: bytes of all parts.
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
        addresses: address of every part in every rank's block, by name and rank.
        place_bytes: bytes of one place, for parts that have a place for each other rank.
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


def lay_out(call: CallShape) -> tuple[Layout, Layout, dict[str, int]]:
    """Return the parts at a block's start, those at its end, and the bytes of their places."""
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
