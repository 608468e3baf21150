# SPDX-License-Identifier: Apache-2.0
"""Calling the user's experts, one by one or all at once by a module of the user's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def run_expert(expert: nn.Module, rows: Tensor) -> Tensor:
    """Apply one expert to its rows.

    Args:
        expert: any module; called with [1, 1, n, H], the rank DeepSpeed calls it with. An expert
            without rows is called with one zero row whose output is discarded, so that all its
            parameters still get a gradient, zero, on every rank.
        rows: [n, H], n may be 0.

    Returns:
        [n, H]; the first item where the module returns a tuple.

    Raises:
        ValueError: the output is not a tensor of the input's shape.
    """
    num_rows, hidden = rows.shape
    inputs = rows if num_rows else F.pad(rows, (0, 0, 0, 1))
    inputs = inputs.view(1, 1, -1, hidden)
    output = as_tensor(expert(inputs), inputs, "an expert", expert)
    return output.view(-1, hidden)[:num_rows]


def as_tensor(output: Any, inputs: Tensor, what: str, module: nn.Module) -> Tensor:
    """Return what experts have computed, the first item of a tuple."""
    first = output[0] if isinstance(output, tuple) and output else output
    name = type(module).__name__
    if not isinstance(first, Tensor):
        got = type(output).__name__
        got = f"a tuple that starts with {type(first).__name__}" if first is not output else got
        raise ValueError(
            f"{what} must return a tensor, or a tuple that starts with one, got {got} from {name}"
        )
    if first.shape != inputs.shape:
        raise ValueError(
            f"{what} must return the shape it was given, {tuple(inputs.shape)}, "
            f"got {tuple(first.shape)} from {name}"
        )
    return first


def run_container(
    container: nn.Module,
    rows: Tensor,
    segments: Sequence[tuple[int, int, int]],
    ep_size: int,
    num_local_experts: int,
) -> Tensor:
    """Apply all local experts at once, by a module that DeepSpeed would call in their place.

    Args:
        container: [W, El, C, H] -> the same; in place of ``deepspeed.moe.experts.Experts``.
        rows: [R, H].
        segments: (rank, local expert, number of rows) in order of the rows, sum R; the same rank
            and expert may come again.
        ep_size: W.
        num_local_experts: El.

    Returns:
        [R, H] in the same order. C is the most rows that a rank has for an expert, at least 1, and
        slots without a row are zero, so that all parameters get a gradient on every rank.

    Raises:
        ValueError: the output is not a tensor of the input's shape.
    """
    filled = np.zeros((ep_size, num_local_experts), dtype=np.int64)
    starts = []
    for rank, expert, count in segments:
        starts.append(filled[rank, expert])
        filled[rank, expert] += count
    capacity = max(int(filled.max()), 1)
    slots = [
        (rank * num_local_experts + expert) * capacity + start + np.arange(count)
        for (rank, expert, count), start in zip(segments, starts, strict=True)
    ]
    index = torch.from_numpy(np.concatenate(slots)).to(rows.device)
    shape = (ep_size, num_local_experts, capacity, rows.shape[1])
    inputs = rows.new_zeros(filled.size * capacity, rows.shape[1]).index_copy(0, index, rows)
    inputs = inputs.view(shape)
    output = as_tensor(container(inputs), inputs, "Experts", container)
    return output.reshape(-1, rows.shape[1]).index_select(0, index)


def run_experts(
    experts: Sequence[nn.Module], rows: Tensor, rows_per_expert: Sequence[int]
) -> Tensor:
    """Apply experts one after the other to contiguous rows.

    Args:
        experts: n modules.
        rows: [R, H], expert-major.
        rows_per_expert: n counts with sum R.

    Returns:
        [R, H] in the same order.
    """
    pieces = rows.split(list(rows_per_expert))
    outputs = [run_expert(e, piece) for e, piece in zip(experts, pieces, strict=True)]
    return torch.cat(outputs)
