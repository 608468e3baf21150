# SPDX-License-Identifier: Apache-2.0
"""The values of the last forward that a layer offers as attributes."""

from __future__ import annotations

import weakref
from typing import Any, cast

from torch import Tensor


class Kept:
    """The auxiliary loss and the experts' counts of a forward.

    The loss has an autograd graph, which holds the layer's input. If the layer held the loss until
    its next forward, it would keep both alive. So the graph of the layer's output holds the loss:
    it lives as long as a backward that may include the loss is possible.

    Args:
        l_aux: [] fp32, or the value that the user's gate returned.
        exp_counts: [E] int64.
    """

    def __init__(self, l_aux: Any, exp_counts: Any) -> None:
        self._l_aux, self.exp_counts = l_aux, exp_counts
        self._with_graph: weakref.ref[Tensor] | None = None

    @property
    def l_aux(self) -> Any:
        """The loss; without its graph once the graph of the output is gone."""
        if self._with_graph is not None and (found := self._with_graph()) is not None:
            return found
        return self._l_aux

    def leave_graph_to(self, output: Tensor) -> None:
        """Let the graph of the layer's output hold the loss, if both have a graph."""
        # torch's annotations take ``metadata``, a dictionary, for a method.
        l_aux, node = self._l_aux, cast(Any, output.grad_fn)
        if not isinstance(l_aux, Tensor) or l_aux.grad_fn is None or node is None:
            return
        node.metadata["comet_ds l_aux"] = l_aux
        self._l_aux, self._with_graph = l_aux.detach(), weakref.ref(l_aux)


class KeepsLastForward:
    """DeepSpeed's attributes ``l_aux`` and ``exp_counts`` of a layer, read from a ``Kept``."""

    @property
    def l_aux(self) -> Any:
        """The last forward's loss, see ``Kept``; None before the first."""
        kept = self.__dict__.get("_kept")
        return None if kept is None else kept.l_aux

    @l_aux.setter
    def l_aux(self, value: Any) -> None:
        self.__dict__["_kept"] = Kept(value, self.exp_counts)

    @property
    def exp_counts(self) -> Any:
        """The last forward's [E] int64, see ``Routing``; None before the first."""
        kept = self.__dict__.get("_kept")
        return None if kept is None else kept.exp_counts

    @exp_counts.setter
    def exp_counts(self, value: Any) -> None:
        self.__dict__["_kept"] = Kept(self.l_aux, value)
