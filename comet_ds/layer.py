# SPDX-License-Identifier: Apache-2.0
"""MoE: DeepSpeed's constructor and attribute tree; what is inside is a MOELayer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepspeed import comm as dist
from deepspeed.moe import layer as deepspeed_layer
from deepspeed.utils import groups, log_dist, logger
from deepspeed.utils.bwc import (
    bwc_pipeline_parallel_world_size,
)
from torch import nn

from comet_ds.checkpoints.whole_state import check_loaded, keep_own_experts
from comet_ds.config import CometConfig
from comet_ds.experts.stacked import StackedExperts
from comet_ds.experts.views import REMEDY
from comet_ds.gate.topk_gate import TopKGate
from comet_ds.interop.overrides import class_for, find_overrides
from comet_ds.moe_layer import MOELayer
from comet_ds.ranks.setup import agree_on_setup


class MoE(deepspeed_layer.MoE):
    """Mixture-of-experts layer: ``deepspeed.moe.layer.MoE`` with overlapped communication.

    Arguments, attributes, parameter names, random draws and result are DeepSpeed's, so the import
    is all that changes; see DeepSpeed's documentation for them. Tokens need not be spread evenly:
    ranks may bring different numbers of tokens, also none. Each may need other gradients: all ranks
    of the expert parallel group take part in a backward.

    Activation checkpointing has to preserve the RNG state where the gate draws, as it does by
    default. Without it, gradients are those of the recomputed routes; where an expert then has
    another number of tokens, torch raises a ``CheckpointError``, except with
    ``use_reentrant=True``.

    Args:
        hidden_size: H, size of a token's activation.
        expert: module [..., H] -> [..., H]; copied for every local expert.
        num_experts: E, experts of the layer over all ranks; a multiple of ``ep_size``.
        ep_size: W, ranks the experts are spread over.
        k: routes per token, 1 to ``num_experts``.
        capacity_factor, eval_capacity_factor, min_capacity, use_residual, noisy_gate_policy,
            drop_tokens, use_rts, enable_expert_tensor_parallelism, top2_2nd_expert_sampling: as in
            DeepSpeed.
        use_tutel: accepted and ignored: Tutel's kernels serve the padded layout, which is not used.
        comet_ds: options of a layer and of its group, see ``CometConfig``. Those that the
            "comet_ds" block of the DeepSpeed JSON sets too are the block's.

    Raises:
        AssertionError: ``num_experts`` not divisible by ``ep_size``, unknown noise policy.
        ValueError: ``k`` out of range, bad option.

    ``load_state_dict`` also takes the whole model's, with the experts of all ranks: each rank loads
    its own.

    Source: ``deepspeed/moe/layer.py``.
    """

    loaded_ep_rank: int | None = None  # whose experts were loaded before the groups existed
    json_block: CometConfig | None = None  # the block of the DeepSpeed JSON, once it is applied

    def __init__(
        self,
        hidden_size: int,
        expert: nn.Module,
        num_experts: int = 1,
        ep_size: int = 1,
        k: int = 1,
        capacity_factor: float = 1.0,
        eval_capacity_factor: float = 1.0,
        min_capacity: int = 4,
        use_residual: bool = False,
        noisy_gate_policy: str | None = None,
        drop_tokens: bool = True,
        use_rts: bool = True,
        use_tutel: bool = False,
        enable_expert_tensor_parallelism: bool = False,
        top2_2nd_expert_sampling: bool = True,
        *,
        comet_ds: CometConfig | Mapping[str, Any] | None = None,
    ) -> None:
        # DeepSpeed's constructor would draw the weights of a gate of its own: skip it, and build
        # in its order, which fixes the initial weights for a seed.
        super(deepspeed_layer.MoE, self).__init__()
        assert num_experts % ep_size == 0, (
            f"Number of experts ({num_experts}) should be divisible by "
            f"expert parallel size ({ep_size})"
        )
        assert noisy_gate_policy in (None, "None", "Jitter", "RSample"), (
            f"Unsupported noisy_gate_policy: {noisy_gate_policy}"
        )
        if not 1 <= k <= num_experts:
            raise ValueError(f"k must be between 1 and num_experts ({num_experts}), got {k}")
        self.use_residual = use_residual
        self.enable_expert_tensor_parallelism = enable_expert_tensor_parallelism
        self.ep_size = ep_size
        self.expert_group_name = f"ep_size_{ep_size}"
        self.num_experts = num_experts
        self.num_local_experts = num_experts // ep_size
        log_dist(
            f"Creating MoE layer with num_experts: {num_experts} | num_local_experts: "
            f"{self.num_local_experts} | expert_parallel_size: {ep_size}",
            [0],
        )
        if use_tutel:
            log_dist("comet_ds: use_tutel is ignored", [0])
        config = self.own_options = CometConfig.parse_layer(comet_ds)
        sizes = (self.num_local_experts, self.expert_group_name)
        experts_class = class_for("Experts", StackedExperts)
        if experts_class is StackedExperts:
            experts = StackedExperts(expert, *sizes, stack=config.stack_experts)
        else:
            experts = experts_class(expert, *sizes)
        gate = class_for("TopKGate", TopKGate)(
            hidden_size,
            num_experts,
            k,
            capacity_factor,
            eval_capacity_factor,
            min_capacity,
            noisy_gate_policy,
            drop_tokens,
            use_rts,
            None,
            top2_2nd_expert_sampling,
        )
        self.deepspeed_moe = class_for("MOELayer", MOELayer)(
            gate, experts, self.expert_group_name, ep_size, self.num_local_experts
        )
        self.deepspeed_moe.hidden_size = hidden_size
        if use_residual:
            self.mlp = expert
            self.coefficient = nn.Linear(hidden_size, 2)
        self._set_options(config)

    @property
    def config(self) -> CometConfig | None:
        """The options; None where the user has put another module in for the MOELayer."""
        return getattr(self.deepspeed_moe, "config", None)

    def configure(self, block: CometConfig) -> None:
        """Apply the block of the DeepSpeed JSON; options it does not set stay the layer's own.

        Call it before ``set_deepspeed_parallelism``, with the same block on all ranks.
        """
        self.json_block = block
        self._set_options(self.own_options.merge(block))

    def _set_options(self, config: CometConfig) -> None:
        if isinstance(self.deepspeed_moe, MOELayer):
            self.deepspeed_moe.configure(config)
        else:
            name = type(self.deepspeed_moe).__qualname__
            logger.warning(f"comet_ds: no options are applied to {name}, put in for the MOELayer")

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Create or join the expert parallel groups; DeepSpeed's engine calls this.

        Collective over the ranks that hold the layer.

        Raises:
            ValueError: on all of them, if they disagree about the layer, ``ep_size`` does not
                divide their number, or some experts of a stack are frozen.
        """
        num_stages = bwc_pipeline_parallel_world_size(groups.mpu)
        stage_size = dist.get_world_size() // num_stages
        first = dist.get_rank() // stage_size * stage_size
        if not isinstance(self.deepspeed_moe, MOELayer):  # the user's
            super().set_deepspeed_parallelism(use_data_before_expert_parallel_)
            return
        experts = self.deepspeed_moe.experts
        if isinstance(experts, StackedExperts):
            experts.unstack_if_replaced()
        agree_on_setup(self._facts(), range(first, first + stage_size))
        if stage_size % self.ep_size:
            raise ValueError(
                f"ep_size must divide the number of ranks that hold the layer ({stage_size}), "
                f"got {self.ep_size}"
            )
        if isinstance(experts, StackedExperts):
            experts.check_frozen()
        self._tag_experts()
        super().set_deepspeed_parallelism(use_data_before_expert_parallel_)
        check_loaded(self, range(first, first + stage_size))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        keep_own_experts(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _facts(self) -> dict[str, Any]:
        """Return what all ranks that hold the layer must agree on."""
        gate, config = self.deepspeed_moe.gate, self.deepspeed_moe.config
        experts = self.deepspeed_moe.experts
        expert = next(iter(self.deepspeed_moe.expert_modules()), experts)
        found = find_overrides(gate, experts)
        options = (
            "k",
            "capacity_factor",
            "eval_capacity_factor",
            "min_capacity",
            "drop_tokens",
            "noisy_gate_policy",
            "use_rts",
            "top2_2nd_expert_sampling",
        )
        return {
            "gate": None if found.is_gate_own else found.gate,
            "experts": type(experts).__qualname__,
            "patched functions": found.layer,
            "hidden_size": self.deepspeed_moe.hidden_size,
            "num_experts": self.num_experts,
            "ep_size": self.ep_size,
            "use_residual": self.use_residual,
            "enable_expert_tensor_parallelism": self.enable_expert_tensor_parallelism,
            **{name: getattr(gate, name, None) for name in options},
            "expert class": type(expert).__qualname__,
            "expert parameters": [
                [name, list(p.shape), str(p.dtype)] for name, p in expert.named_parameters()
            ],
            "expert parameters are stacked": list(getattr(experts, "shapes", ())),
            f"experts that are frozen without the others ({REMEDY})": (
                experts.partly_frozen() if isinstance(experts, StackedExperts) else {}
            ),
            "having loaded the whole model's state_dict": self.loaded_ep_rank is not None,
            "path": config.path,
            "num_chunks": config.num_chunks,
            "exact_gate": config.exact_gate,
            "timeout_s": config.timeout_s,
            "refine": config.refine,
            "max_rows_factor": config.max_rows_factor,
        }

    def _tag_experts(self) -> None:
        """Mark parameters as experts' for DeepSpeed: not all-reduced, owned by a group."""
        for param in self.deepspeed_moe.experts.parameters():
            param.allreduce = False
            param.group_name = self.expert_group_name

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._tag_experts()  # copy.deepcopy of a parameter loses them
