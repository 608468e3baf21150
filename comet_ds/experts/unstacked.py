# SPDX-License-Identifier: Apache-2.0
"""The parameters that have replaced a stack, for lists of parameters that still hold it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

if TYPE_CHECKING:
    from comet_ds.experts.stacked import StackedExperts


class Unstacked(NamedTuple):
    """The parameters that have replaced a stack.

    Attributes:
        experts: the layer's experts; None for a parameter that is no former stack.
        params: one parameter of each expert; None for an expert whose module was replaced.
    """

    experts: StackedExperts | None
    params: list[nn.Parameter | None]


def unstacked_parameters(params: Sequence[Any]) -> list[Any]:
    """Replace every former stack in a list by the experts' own parameters.

    Parameters that replace neighbouring stacks of a layer are ordered by expert, then by stack, as
    in ``experts.parameters()``.

    Args:
        params: parameters of an optimizer, possibly with former stacks.
    """
    result: list[Any] = []
    nothing = Unstacked(None, [])
    by_layer = itertools.groupby(params, lambda p: getattr(p, "_unstacked", nothing).experts)
    for experts, neighbours in by_layer:
        if experts is None:
            result += neighbours
            continue
        by_expert = zip(*(stack._unstacked.params for stack in neighbours), strict=True)
        result += [param for group in by_expert for param in group if param is not None]
    return result
