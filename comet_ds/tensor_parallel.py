# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism of a model's dense part: ranks that hold the same tokens share the work.

With whole experts, each rank of a tensor parallel (TP) group takes an equal share of the tokens
through its expert parallel group, and the outputs are gathered. With tensor parallel experts every
rank needs all rows, and nothing is shared.

Worked example, TP size 2, tokens a, b, c: rank 0 takes a and b, rank 1 takes c and a token of zeros
without routes; the gathered output is cut back to three tokens.
"""

from __future__ import annotations

import torch.nn.functional as F
from deepspeed.moe.mappings import drop_tokens, gather_tokens
from deepspeed.utils import groups
from deepspeed.utils.bwc import bwc_tensor_model_parallel_world_size
from torch import Tensor

from comet_ds._compat.deepspeed import expert_tensor_parallel_size
from comet_ds.fused.weights import ALIGNMENT_BYTES
from comet_ds.gate.routing import Routing, count_slots


def has_tensor_parallel_experts() -> bool:
    """Whether each expert is spread over a TP group."""
    return groups.mpu is not None and expert_tensor_parallel_size() > 1


def num_shares() -> int:
    """Return how many ranks share the same tokens; 1 without tensor parallelism."""
    if groups.mpu is None or has_tensor_parallel_experts():
        return 1
    return bwc_tensor_model_parallel_world_size(groups.mpu)


def take_share(tensor: Tensor, fill: float = 0) -> Tensor:
    """Return this rank's share of the tokens, [ceil(T / shares), ...].

    Args:
        tensor: [T, n]; the same on all ranks of the TP group.
        fill: value of the tokens that are appended until the shares are equal.
    """
    padding = -tensor.shape[0] % num_shares()
    # DeepSpeed's mappings take flat tensors everywhere, others not on gloo.
    flat = F.pad(tensor, (0, 0, 0, padding), value=fill).reshape(-1)
    share = drop_tokens(flat).view(-1, tensor.shape[1])
    # A share may begin anywhere in the tensor; kernels read 16 bytes at a time.
    return share.clone() if share.data_ptr() % ALIGNMENT_BYTES else share


def take_share_of_routing(routing: Routing, tokens: Tensor) -> Routing:
    """Return the routing of this rank's share of the tokens.

    Args:
        routing: of all tokens.
        tokens: [ceil(T / shares), H], this rank's share.
    """
    ids = take_share(routing.topk_ids, fill=-1)
    weights = take_share(routing.topk_weights)
    share = routing._replace(topk_ids=ids, topk_weights=weights, tokens=tokens)
    if routing.slot_in_expert is None:  # the fused path needs them, and the CUDA gate has run
        return share
    slots, kept_counts = count_slots(ids, routing.exp_counts.numel())
    return share._replace(slot_in_expert=slots, kept_counts=kept_counts)


def gather_shares(output: Tensor, num_tokens: int) -> Tensor:
    """Return the outputs of all shares, [T, H].

    Args:
        output: [ceil(T / shares), H], this rank's.
        num_tokens: T.
    """
    return gather_tokens(output.reshape(-1)).view(-1, output.shape[1])[:num_tokens]
