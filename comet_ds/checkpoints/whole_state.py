# SPDX-License-Identifier: Apache-2.0
"""State dicts of the whole model, with the experts of all ranks: each rank takes its own."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.moe.layer import MoE
from torch import nn

from comet_ds.checkpoints.names import renumber
from comet_ds.ranks.setup import agree_on_setup

_OTHERS = (
    "having loaded another rank's experts, because ranks have another order here (load the "
    "state_dict after deepspeed.initialize),"
)
_EXPERTS = "deepspeed_moe.experts.deepspeed_experts."


def keep_own_experts(layer: MoE, state_dict: dict[str, Any], prefix: str) -> None:
    """Replace the experts of all ranks in a state_dict by this rank's, under their local numbers.

    A state_dict with as many experts as a rank has is this rank's, and stays.

    Args:
        layer: that is about to be loaded.
        state_dict: changed in place.
        prefix: of the layer's names in it.

    Raises:
        RuntimeError: it has neither all experts nor as many as a rank; the ranks are not known yet.
    """
    start = prefix + _EXPERTS
    places = {}
    for name in state_dict:
        number, _, rest = name.removeprefix(start).partition(".")
        if name.startswith(start) and number.isdecimal() and rest:
            places[name] = int(number), rest
    numbers = {number for number, _ in places.values()}
    if numbers <= set(range(layer.num_local_experts)):
        return
    if numbers != set(range(layer.num_experts)):
        raise RuntimeError(
            f"a state_dict must have all {layer.num_experts} experts of {prefix or 'the layer'} or "
            f"the {layer.num_local_experts} of this rank, got experts {sorted(numbers)}"
        )
    first = _ep_rank(layer) * layer.num_local_experts
    tensors = {name: state_dict.pop(name) for name in places}
    for name, (number, rest) in places.items():
        if 0 <= number - first < layer.num_local_experts:
            state_dict[f"{start}{number - first}.{rest}"] = tensors[name]


def _ep_rank(layer: MoE) -> int:
    """Return the layer's rank in its expert parallel group: before it exists, DeepSpeed's usual."""
    group = layer.deepspeed_moe.ep_group
    if group is not None:
        return dist.get_rank(group=group)
    if not torch.distributed.is_initialized():
        raise RuntimeError(
            f"a state_dict with the experts of all ranks needs to know this one's (ep_size is "
            f"{layer.ep_size}): call deepspeed.init_distributed() or deepspeed.initialize first"
        )
    layer.loaded_ep_rank = torch.distributed.get_rank() % layer.ep_size
    return layer.loaded_ep_rank


def check_loaded(layer: MoE, ranks: range) -> None:
    """Check that the experts which were loaded before the groups existed are this rank's.

    Args:
        layer: with its groups.
        ranks: global ones that hold it; all call this, and all have loaded such experts or none.

    Raises:
        ValueError: on all ranks, where some has another's.
    """
    if layer.loaded_ep_rank is None:
        return
    is_other = layer.loaded_ep_rank != dist.get_rank(group=layer.deepspeed_moe.ep_group)
    layer.loaded_ep_rank = None
    # False on the first rank in any order of ranks.
    agree_on_setup({_OTHERS: is_other}, ranks)


def gather_experts(module: nn.Module, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a model's state_dict with the experts of all ranks, on rank 0; collective.

    Args:
        module: the model, with process groups.
        state_dict: its state_dict; parameters may be left out, on all ranks the same.

    Returns:
        On rank 0 a dictionary whose experts are in CPU memory, elsewhere the one given.
    """
    whole = dict(state_dict)
    for path, layer in module.named_modules():
        if not isinstance(layer, MoE) or layer.ep_size == 1:
            continue
        group = layer.deepspeed_moe.ep_group
        if 0 not in torch.distributed.get_process_group_ranks(group):
            continue
        start = f"{path}.{_EXPERTS}" if path else _EXPERTS
        own = {name: tensor for name, tensor in state_dict.items() if name.startswith(start)}
        gathered: list[dict[str, Any]] = [{} for _ in range(layer.ep_size)]
        for name, tensor in own.items():
            parts = _gather(tensor, group, layer.ep_size)
            for rank, (found, part) in enumerate(zip(gathered, parts, strict=False)):
                found[renumber(name, rank * layer.num_local_experts)] = part
        if dist.get_rank() == 0:
            whole = _put(whole, own, {n: t for found in gathered for n, t in found.items()})
    return whole if dist.get_rank() == 0 else state_dict


def _gather(tensor: torch.Tensor, group: Any, size: int) -> list[torch.Tensor]:
    """Return the tensors of all ranks of a group, on rank 0 in CPU memory, elsewhere none."""
    tensor = tensor.detach().contiguous()
    parts = [torch.empty_like(tensor) for _ in range(size)] if dist.get_rank() == 0 else None
    torch.distributed.gather(tensor, parts, dst=0, group=group)
    return [part.cpu() for part in parts or []]


def _put(whole: dict[str, Any], old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Return a dictionary with some neighbours replaced by others."""
    found: dict[str, Any] = {}
    for name, value in whole.items():
        if name not in old:
            found[name] = value
        elif not found.keys() & new.keys():
            found |= new
    return found
