# SPDX-License-Identifier: Apache-2.0
"""Which CTA split a forward runs with: a measured one, one to try, or the cost model's."""

from __future__ import annotations

import functools

from comet_ds.tuning.cost_model import CtaSplit, LayerShape, choose_split
from comet_ds.tuning.online import RunTuner, Trial
from comet_ds.tuning.table import Origin, TuningTable


class SplitPolicy:
    """Chooses the CTA splits of all layers of an expert parallel group.

    Every rank of the group needs a policy with the same table and origin: ranks must agree on
    whether tokens are pushed.

    Args:
        origin: where the table's entries must have been measured to be used.
        table: splits that were measured before this run; none unless given.
        tuner: measures in this run what the table does not have; None measures nothing.

    Attributes:
        origin: as given; what is measured with this policy belongs to it.
        pinned: split of every layer, whatever table, tuner and cost model say; None pins none.
    """

    def __init__(
        self, origin: Origin, table: TuningTable | None = None, tuner: RunTuner | None = None
    ) -> None:
        self.origin, self._tuner = origin, tuner
        self._table = TuningTable() if table is None else table
        self.pinned: CtaSplit | None = None
        # A layer asks in every forward, and a model has few shapes.
        self._look_up = functools.lru_cache(maxsize=256)(self._find)

    @property
    def measures(self) -> bool:
        """Whether a layer's split may change from forward to forward."""
        return self._tuner is not None

    def choose(self, shape: LayerShape, has_backward: bool) -> Trial:
        """Return the trial of a layer's forward and its backward.

        Collective over the group, and waits, in forwards in which a tuner compares candidates.

        Args:
            shape: of the layer, on this rank.
            has_backward: whether a backward will follow; a tuner tries nothing without one.
        """
        if self.pinned is not None:
            return Trial(self.pinned)
        cta_split, is_measured = self._look_up(shape)
        if self._tuner is not None and not is_measured:
            return self._tuner.trial(shape, has_backward)
        return Trial(cta_split)

    def _find(self, shape: LayerShape) -> tuple[CtaSplit, bool]:
        """Return a layer's split, and whether the table has it."""
        found = self._table.find(shape, self.origin)
        return found or choose_split(shape), found is not None
