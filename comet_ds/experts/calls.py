# SPDX-License-Identifier: Apache-2.0
"""Calling the user's expert modules one by one, or all at once through a user's container."""

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
        expert: any module; called with [1, 1, n, H], as many dimensions as DeepSpeed gives it. For
            n = 0 it is called with one zero row and the output is discarded, so that all its
            parameters get a gradient (zero) on every rank.
        rows: [n, H]; n may be 0.

    Returns:
        [n, H]; the first item if the module returns a tuple.

    Raises:
        ValueError: the output is not a tensor of the input's shape.
    """
    num_rows, hidden = rows.shape
    inputs = rows if num_rows else F.pad(rows, (0, 0, 0, 1))
    inputs = inputs.view(1, 1, -1, hidden)
    output = as_tensor(expert(inputs), inputs, "an expert", expert)
    return output.view(-1, hidden)[:num_rows]


def as_tensor(output: Any, inputs: Tensor, what: str, module: nn.Module) -> Tensor:
    """Return the output of a user's module as a tensor.

    Args:
        output: what the module returned: a tensor, or a tuple that starts with one.
        inputs: what it was given; the output must have the same shape.
        what: name of the module's role in messages, such as "an expert".
        module: the module, for messages.

    Raises:
        ValueError: the output is not a tensor of the input's shape.
    """
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
    """Apply all local experts in one call of the module that DeepSpeed would call.

    Args:
        container: [W, El, C, H] -> [W, El, C, H]; the user's replacement of
            ``deepspeed.moe.experts.Experts``. C is the largest number of rows of one expert from
            one rank, at least 1. Slots without a row are zero, so that all parameters get a
            gradient on every rank.
        rows: [R, H].
        segments: (rank, local expert, number of rows) in order of the rows; the numbers add up to
            R. The same rank and expert may appear several times.
        ep_size: number of ranks, W.
        num_local_experts: number of experts of a rank, El.

    Returns:
        [R, H] in the order of ``rows``.

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
        rows_per_expert: number of rows of each expert; they add up to R.

    Returns:
        [R, H] in the order of ``rows``.
    """
    rows_of_experts = rows.split(list(rows_per_expert))
    outputs = [run_expert(e, own) for e, own in zip(experts, rows_of_experts, strict=True)]
    return torch.cat(outputs)
