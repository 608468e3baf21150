# SPDX-License-Identifier: Apache-2.0
"""What a layer keeps of its last forward for those who read its attributes."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor


class Kept:
    """The auxiliary loss and the experts' counts of a forward.

    The loss has a graph, and the graph holds the layer's input. A layer that held it until its next
    forward would keep both alive; so the graph of the layer's output does, which is there as long
    as anyone can still run a backward that the loss may be a part of.

    Args:
        l_aux: 0-dim, or what the user's gate returned.
        exp_counts: [E] int64.
    """

    def __init__(self, l_aux: Any, exp_counts: Any) -> None:
        self._l_aux, self.exp_counts = l_aux, exp_counts
        self._with_graph: weakref.ref[Tensor] | None = None

    @property
    def l_aux(self) -> Any:
        """The loss; its value without a graph where nobody holds the graph any more."""
        if self._with_graph is not None and (found := self._with_graph()) is not None:
            return found
        return self._l_aux

    def leave_graph_to(self, output: Tensor) -> None:
        """Let the loss live as long as the graph of the layer's output, where there is one."""
        l_aux, node = self._l_aux, output.grad_fn
        if not isinstance(l_aux, Tensor) or l_aux.grad_fn is None or node is None:
            return
        node.metadata["comet_ds l_aux"] = l_aux
        self._l_aux, self._with_graph = l_aux.detach(), weakref.ref(l_aux)
