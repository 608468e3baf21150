# SPDX-License-Identifier: Apache-2.0
"""Loading and making state dicts with the experts of all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from deepspeed import comm as dist
from deepspeed.moe.layer import MoE
from torch import nn

from comet_ds.checkpoints.names import renumber
from comet_ds.ranks.setup import agree_on_setup

if TYPE_CHECKING:
    from comet_ds.layer import MoE as OwnMoE

_OTHERS = (
    "having loaded another rank's experts, because ranks have another order here (load the "
    "state_dict after deepspeed.initialize),"
)
_EXPERTS = "deepspeed_moe.experts.deepspeed_experts."


def keep_own_experts(layer: OwnMoE, state_dict: dict[str, Any], prefix: str) -> None:
    """Reduce a state_dict with the experts of all ranks to this rank's, under their local names.

    A state_dict with as many experts as a rank has is taken for this rank's and stays unchanged.

    Args:
        layer: the layer that is about to load it.
        state_dict: changed in place.
        prefix: prefix of the layer's names in ``state_dict``.

    Raises:
        RuntimeError: ``state_dict`` has neither the experts of all ranks nor those of one, or
            torch.distributed is not initialised.
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


def _ep_rank(layer: OwnMoE) -> int:
    """Return the layer's expert parallel rank, DeepSpeed's default while it has no group."""
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


def check_loaded(layer: OwnMoE, ranks: range) -> None:
    """Check that experts which were loaded before the process groups existed are this rank's.

    Args:
        layer: the layer, with its process groups.
        ranks: global ranks that hold the layer. All call this function, and either all have loaded
            the experts of all ranks or none has.

    Raises:
        ValueError: on all ranks, if one of them has loaded another rank's experts.
    """
    if layer.loaded_ep_rank is None:
        return
    is_other = layer.loaded_ep_rank != dist.get_rank(group=layer.deepspeed_moe.ep_group)
    layer.loaded_ep_rank = None
    # False on the first rank whatever the order of ranks is.
    agree_on_setup({_OTHERS: is_other}, ranks)


def gather_experts(module: nn.Module, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Gather the experts of all ranks into a model's state_dict on rank 0. Collective.

    Args:
        module: the model, with process groups.
        state_dict: the model's state_dict; it may lack parameters, the same on all ranks.

    Returns:
        On rank 0 a dictionary with all experts, in CPU memory; on other ranks ``state_dict``.
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
    """Return the tensors of all ranks of a group in CPU memory on rank 0, [] on other ranks."""
    tensor = tensor.detach().contiguous()
    parts = [torch.empty_like(tensor) for _ in range(size)] if dist.get_rank() == 0 else None
    torch.distributed.gather(tensor, parts, dst=0, group=group)
    return [part.cpu() for part in parts or []]


def _put(whole: dict[str, Any], old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Return a dictionary with the keys of ``old``, which are neighbours, replaced by ``new``."""
    found: dict[str, Any] = {}
    for name, value in whole.items():
        if name not in old:
            found[name] = value
        elif not found.keys() & new.keys():
            found |= new
    return found
