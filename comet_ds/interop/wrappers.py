# SPDX-License-Identifier: Apache-2.0
"""Refusing data parallel wrappers that take the experts of all ranks for copies.

DistributedDataParallel gives every rank the parameters of the first rank and averages gradients;
FSDP shards parameters over all ranks. With ``ep_size`` above 1 the ranks hold different experts,
so both would silently train another model. DeepSpeed's engine recognises experts by their tags.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from comet_ds._compat.torch import FSDP_MARK, active_ddp

_REMEDY = (
    "Build the model anew, without {wrapper}, and let comet_ds.initialize or deepspeed.initialize "
    "train it; or leave the experts out of {wrapper} ({how}) and reduce their gradients over the "
    "expert data parallel group yourself"
)


class WrapperCheck:
    """Detects wrapped experts of an expert parallel group; cheap enough for every forward.

    Args:
        experts: the layer's ``Experts``, whose parameters have DeepSpeed's tags.
    """

    def __init__(self, experts: nn.Module) -> None:
        self.experts = experts
        self._accepted: Any = None  # weak reference to a DistributedDataParallel without experts

    def __reduce__(self) -> tuple[type, tuple]:
        """Leave the accepted wrapper out of copies."""
        return WrapperCheck, (self.experts,)

    def check(self, group: Any) -> None:
        """Refuse experts that are wrapped.

        Args:
            group: expert parallel group of more than one rank.

        Raises:
            ValueError: names the wrapper and the remedy. Raised on every rank, because a wrapper is
                the same on all.
        """
        if self._is_sharded():
            how = "ignored_states, for fully_shard ignored_params"
            raise ValueError(_message("FSDP", how, "shards parameters over all of them"))
        wrapper = active_ddp()
        if wrapper is None or (self._accepted is not None and self._accepted() is wrapper):
            return
        if self._is_replicated(wrapper, group):
            how = "DistributedDataParallel._set_params_and_buffers_to_ignore_for_model"
            does = "has given all of them those of its first rank and averages their gradients"
            raise ValueError(_message("DistributedDataParallel", how, does))
        self._accepted = weakref.ref(wrapper)

    def check_stacks(self) -> None:
        """Refuse stacked experts that are sharded, also if all experts are local.

        Raises:
            ValueError: FSDP shards the stacks; names the remedy.
        """
        if self._is_sharded():
            raise ValueError(
                "FSDP cannot shard stacked experts, whose modules have views of them: give the "
                'layer comet_ds={"stack_experts": False}, or leave the experts out of FSDP '
                "(ignored_states, for fully_shard ignored_params)"
            )

    def _is_sharded(self) -> bool:
        return FSDP_MARK in self.experts.__dict__ and is_sharded(self.experts)

    def _is_replicated(self, wrapper: DistributedDataParallel, group: Any) -> bool:
        """Return whether the wrapper replicates an expert over ranks of the group."""
        own = {id(param) for param in self.experts.parameters()}
        ranks = torch.distributed.get_process_group_ranks
        return len(set(ranks(wrapper.process_group)) & set(ranks(group))) > 1 and any(
            id(param) in own and name not in wrapper.parameters_to_ignore
            for name, param in wrapper.module.named_parameters()
        )


def is_sharded(experts: nn.Module) -> bool:
    """Return whether FSDP has replaced the experts' parameters; its own lack DeepSpeed's tags."""
    params = list(experts.parameters())
    return not params or not all(hasattr(param, "group_name") for param in params)


def _message(wrapper: str, how: str, does: str) -> str:
    return (
        f"experts differ between the ranks of an expert parallel group, but {wrapper} {does}. "
        + _REMEDY.format(wrapper=wrapper, how=how)
    )
