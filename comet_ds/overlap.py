# SPDX-License-Identifier: Apache-2.0
"""How many CTAs of a GEMM kernel communicate beside it: a cost model.

A CTA set apart computes nothing, so the GEMM takes ``num_sms / (num_sms - n)`` times as long; one
too few and tiles wait for rows, or results for their way out. The rates are what an H200 gives.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

GEMM_FLOPS = 650e12  # of a GEMM on all SMs, FLOP/s
LINK_BYTES = 340e9  # over NVLink, one direction, bytes/s
PULL_BYTES = 70e9  # read and written by one CTA that pulls, bytes/s
PUSH_BYTES = 42e9  # read and written by one CTA that sums and pushes, bytes/s


@dataclass(frozen=True)
class Traffic:
    """What one direction moves between this rank and the others, as expected of a uniform routing.

    Attributes:
        num_sms: of the GPU.
        num_ranks: W.
        tokens: (token, rank) pairs of other ranks' tokens that have an expert here.
        rows: their rows.
        all_rows: with those of this rank's own tokens.
        token_bytes: of one.
    """

    num_sms: int
    num_ranks: int
    tokens: float
    rows: float
    all_rows: float
    token_bytes: int

    @classmethod
    def expected(
        cls, num_tokens: tuple[int, ...], rank: int, top_k: int, token_bytes: int, num_sms: int
    ) -> Traffic:
        """Return the traffic of W ranks with so many tokens each."""
        num_ranks, total = len(num_tokens), sum(num_tokens)
        foreign, share = total - num_tokens[rank], top_k / num_ranks
        is_here = 1 - (1 - 1 / num_ranks) ** top_k
        rows = (foreign * share, total * share)
        return cls(num_sms, num_ranks, foreign * is_here, *rows, token_bytes)

    @functools.lru_cache(maxsize=256)  # noqa: B019 - keeps small values; asked every forward
    def pull_ctas(self, flop_per_row: float) -> int:
        """Return n for pulling beside a GEMM of so many FLOP a row.

        A 1 / W of it are rows of this rank's tokens; the rest waits for what is pulled.
        """

        def cost(n: int) -> float:
            gemm, pull = self._gemm(flop_per_row, n), self._move(PULL_BYTES, n)
            return max(gemm, pull + gemm * (1 - 1 / self.num_ranks))

        return self._best(cost)

    @functools.lru_cache(maxsize=256)  # noqa: B019
    def push_ctas(self, flop_per_row: float, num_panels: int) -> int:
        """Return n for summing and pushing beside a GEMM of so many FLOP a row.

        Args:
            flop_per_row: of the GEMM.
            num_panels: the GEMM's results are pushed panel by panel; 0 where other results are
                pushed, all of them there from the start.
        """

        def cost(n: int) -> float:
            gemm, push = self._gemm(flop_per_row, n), self._move(PUSH_BYTES, n)
            if num_panels == 0:
                return max(gemm, push)
            return max(gemm + push / num_panels, push + gemm / num_panels)

        return self._best(cost)

    def _gemm(self, flop_per_row: float, n: int) -> float:
        return flop_per_row * self.all_rows / GEMM_FLOPS * self.num_sms / (self.num_sms - n)

    def _move(self, rate: float, n: int) -> float:
        moved = (self.tokens + self.rows) * self.token_bytes
        return max(self.tokens * self.token_bytes / LINK_BYTES, moved / (rate * n))

    def _best(self, cost: Callable[[int], float]) -> int:
        return min(range(2, self.num_sms // 2 + 1, 2), key=cost)
