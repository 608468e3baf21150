# SPDX-License-Identifier: Apache-2.0
"""MOELayer: one forward, from the tokens to the output; picks the path and runs it."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.moe import sharded_moe
from torch import Tensor, nn

from comet_ds._compat.deepspeed import (
    expert_parallel_groups,
    warn_once,
)
from comet_ds.config import CometConfig
from comet_ds.experts.mlp import parameter_dtypes
from comet_ds.experts.stacked import StackedExperts
from comet_ds.fused.experts import FusedExperts
from comet_ds.fused.peer.exchange import Exchange
from comet_ds.fused.peer.host_status import RankStatus
from comet_ds.fused.refusal import Refusal
from comet_ds.fused.weights import ExpertWeights
from comet_ds.gate.routing import Routing
from comet_ds.gate.topk_gate import TopKGate
from comet_ds.interop.kept import KeepsLastForward, Kept
from comet_ds.interop.overrides import Overrides, call_gate, find_overrides
from comet_ds.interop.traced import STRICT_EXPORT, is_traced, run_traced
from comet_ds.interop.wrappers import WrapperCheck
from comet_ds.observe.breakdown import publish_times, running_timer
from comet_ds.path import PathChoice, TakeOther
from comet_ds.pipelined import row_ops
from comet_ds.pipelined.chunks import ChunkChoice
from comet_ds.pipelined.counts import CountExchange
from comet_ds.pipelined.forward import pipelined_forward
from comet_ds.pipelined.grouped_mlp import ExpertRunner
from comet_ds.pipelined.plan import plan_routes
from comet_ds.ranks.gradients import find_needs
from comet_ds.ranks.waiting import Attendance
from comet_ds.reference import reference_forward
from comet_ds.tensor_parallel import gather_shares, num_shares, take_share, take_share_of_routing
from comet_ds.validation import InputRules

_NO_CONTEXT = nullcontext()


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Make a CUDA device the current one, where it is not."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NO_CONTEXT
    return torch.cuda.device(device)


class MOELayer(KeepsLastForward, sharded_moe.MOELayer):
    """Gate, dispatch, experts, combine.

    Attributes beyond DeepSpeed's:
        config: the options.
        path: "reference", "pipelined" or "fused"; what the last forward took.
        routing: the last forward's ``Routing``, detached; None before the first.
    """

    hidden_size: int  # H, set by ``MoE``
    # DeepSpeed's, or whatever module the user has put in their place.
    gate: Any
    experts: Any
    ep_group: Any
    ep_size: int
    num_local_experts: int
    wall_clock_breakdown: bool
    __dict__: dict[str, Any]

    def configure(self, config: CometConfig) -> None:
        """Set the options."""
        self.config = config
        if not config.stack_experts and isinstance(self.experts, StackedExperts):
            self.experts.unstack('"stack_experts" is false')
        self.path = "pipelined" if config.path == "auto" else config.path
        if isinstance(self.gate, TopKGate):
            self.gate.exact_logits = config.exact_gate
        sizes = (self.ep_size, self.num_local_experts)
        self.choice = PathChoice(config, *sizes, self.gate)
        self.chunks = ChunkChoice(config, *sizes, self.gate, self.experts)
        self.fused = FusedExperts(config.max_rows_factor)
        self.runner = ExpertRunner(self.expert_modules(), grouped_gemm=config.grouped_gemm)
        self.overrides = Overrides()
        self.wrapper_check = WrapperCheck(self.experts)
        self.routing: Routing | None = None
        self._waits: Attendance | None = None
        self._announced: Any = None  # what the last line in the log was about
        self._reason: str | None = None  # why the path is not fused
        self._rules: InputRules | None = None

    def expert_modules(self) -> Sequence[nn.Module]:
        """Return the local experts; none where the user's ``Experts`` does not show them."""
        return getattr(self.experts, "deepspeed_experts", ())

    def _set_ep_group(self, ep_group: Any) -> None:
        """Set the expert parallel group, also of a gate that takes one."""
        self.ep_group = ep_group
        if hasattr(self.gate, "_set_ep_group"):
            self.gate._set_ep_group(ep_group)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out of copies what belongs to this process or to the last forward's graph."""
        own = ("ep_group", "_kept", "_announced", "_rules", "_waits")
        return {**self.__dict__, **dict.fromkeys(own)}

    def forward(self, hidden_states: Tensor, used_token: Tensor | None = None) -> Tensor:
        """Compute the layer for this rank's tokens.

        Args:
            hidden_states: [..., H] in the experts' dtype, or another if they are no recognised MLPs
                and take it, on the layer's device. Ranks may bring different numbers of tokens,
                also none, but the same dtype.
            used_token: see ``TopKGate.route``.

        Returns:
            [..., H]; sets ``l_aux`` and ``exp_counts``. Collective over the EP group.

        Raises:
            ValueError: input of wrong size, dtype or device (on every rank of the EP group,
                whichever rank it happened on); an expert that returns a wrong shape; experts of a
                stack that are frozen without the others; experts of several ranks wrapped by
                DistributedDataParallel or FSDP.
            RuntimeError: ep_size > 1 without process groups; a rank of the EP group that did not
                come within ``timeout_s``.
        """
        # The decorator's wrapper takes 20 us of host time: compiled callers alone need it.
        run = self._run_uncompiled if torch.compiler.is_compiling() else self._run_forward
        return run(hidden_states, used_token)

    @torch.compiler.disable(reason=STRICT_EXPORT)
    def _run_uncompiled(self, hidden_states: Tensor, used_token: Tensor | None) -> Tensor:
        return self._run_forward(hidden_states, used_token)

    def _run_forward(self, hidden_states: Tensor, used_token: Tensor | None) -> Tensor:
        found = find_overrides(self.gate, self.experts)
        self._note_overrides(found)
        if found.layer is not None:
            return self._run_deepspeeds(hidden_states, used_token, found.layer)
        if is_traced():
            output, self.__dict__["_kept"] = run_traced(self, hidden_states, used_token)
            return output
        group = self._group()
        self._check_experts(group)
        size = self.hidden_size
        fits = hidden_states.shape[-1:] == (size,)
        x = hidden_states.reshape(-1, size) if fits else hidden_states.new_empty(0, size)
        shares = num_shares()
        own = take_share(x) if shares > 1 else x  # what this rank takes through its group
        exchange = self.choice.connect(group, self._weight().device)
        weights = self._recognise(own, exchange)
        rules = self._input_rules(weights)
        if rules.check(hidden_states, used_token)[0] != rules.OK:
            rules = self._input_rules(is_fresh=True)  # modules may have been put in
            fault = rules.check(hidden_states, used_token)
            if fault[0] != rules.OK:
                self._raise_everywhere(fault, rules, group, exchange)
        with self._timed(sharded_moe.MOE_TIMER), _current(hidden_states.device):
            needs = functools.partial(self._fused_needs, x)
            decision = self.choice.choose(weights, needs, own.shape[0], exchange, rules)
            # Module.__setattr__ looks every one of these up in three tables.
            state, gate, call = self.__dict__, self.gate, None
            if isinstance(decision, TakeOther):
                state["path"], state["_reason"] = decision.path, decision.why_not_fused
            else:
                state["path"], state["_reason"] = "fused", None
                if self._announced is not decision.weights:
                    self._announce(f"{decision.weights.describe()} experts")
                    state["_announced"] = decision.weights
                peers = exchange if isinstance(exchange, Exchange) else None
                arguments = decision.weights, decision.num_tokens, gate, peers, decision.needs
                call = self.fused.prepare(*arguments, num_shares=shares)
                own = call.begin(own)
                if shares == 1:
                    x = own
            if found.gate is None:
                routing = gate.route(x, used_token)
                l_aux = routing.l_aux
            else:
                options = self.use_tutel, self.num_local_experts * self.ep_size
                routing, l_aux = call_gate(gate, found, x, used_token, *options)
            state["_kept"] = kept = Kept(l_aux, routing.exp_counts)
            state["routing"] = routing.detach()
            if shares > 1:
                routing = take_share_of_routing(routing, own)
            if call is not None:
                output = call.run(routing)
            else:
                output = self._run(own, routing.topk_ids, routing.topk_weights, group, rules)
            if shares > 1:
                output = gather_shares(output, x.shape[0])
        if self.wall_clock_breakdown:
            publish_times(self, has_all_to_all=self.ep_size > 1 and self.path == "pipelined")
        output = output.reshape(hidden_states.shape)
        kept.leave_graph_to(output)
        return output

    def _check_experts(self, group: Any) -> None:
        """Refuse experts that are wrapped or frozen in part, see ``forward``."""
        if self.ep_size > 1:
            self.wrapper_check.experts = self.experts
            self.wrapper_check.check(group)
        if isinstance(self.experts, StackedExperts):
            if self.experts.is_stacked:
                self.wrapper_check.check_stacks()
            self.experts.check_frozen()

    def _attendance(self, group: Any) -> Attendance:
        """Return what waits for the ranks of the group and names the one that is late."""
        if self._waits is None or self._waits.group is not group:
            self._waits = Attendance(group, self.config.timeout_s)
        return self._waits

    def _recognise(self, x: Tensor, exchange: Exchange | Refusal | None) -> ExpertWeights | Refusal:
        """Return the experts' weights for the fused path, or why it cannot be taken."""
        if isinstance(exchange, Refusal):
            return exchange
        if not self.choice.may_fuse:
            return Refusal("the configuration pins another path")
        if (reason := self.overrides.why_not_fused()) is not None:
            return Refusal(reason)
        return self.fused.recognise(self.experts.deepspeed_experts, x)

    def _fused_needs(self, x: Tensor, weights: ExpertWeights) -> int:
        return find_needs(x, (x, self.gate.wg.weight), weights.parameters)

    def _note_overrides(self, found: Overrides) -> None:
        """Let the parts of the layer know what is there now."""
        state = self.__dict__
        state["overrides"] = found
        self.choice.gate = self.chunks.gate = self.gate
        self.chunks.experts, self.runner.experts = self.experts, self.expert_modules()
        self.runner.container = None if found.experts is None else self.experts
        self.runner.overridden = found.experts or found.hooks

    def _run_deepspeeds(
        self, hidden_states: Tensor, used_token: Tensor | None, patched: str
    ) -> Tensor:
        """Run DeepSpeed's forward, of which the user has patched something.

        Raises:
            RuntimeError: the configuration pins a path, none of which has what is patched.
        """
        if self.config.path != "auto":
            raise RuntimeError(f'path "{self.config.path}" is pinned and cannot run: {patched}')
        state = self.__dict__
        state["path"], state["_reason"], state["routing"] = "deepspeed", patched, None
        self._announce("DeepSpeed's own forward")
        with self.experts.unbound() if isinstance(self.experts, StackedExperts) else nullcontext():
            inputs: tuple[Any, ...] = hidden_states, used_token
            output = super().forward(*inputs)
        state["_kept"].leave_graph_to(output)
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> MOELayer:
        """Copy the layer; whatever in it holds its process group has none then."""
        if self.ep_group is not None:
            memo[id(self.ep_group)] = None
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return made

    def _run(
        self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, group: Any, rules: InputRules
    ) -> Tensor:
        with self.experts.unbound() if isinstance(self.experts, StackedExperts) else _NO_CONTEXT:
            if self.path == "reference":
                return self._run_reference(x, topk_ids, topk_weights, group, rules)
            return self._run_pipelined(x, topk_ids, topk_weights, group, rules)

    def _run_pipelined(
        self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, group: Any, rules: InputRules
    ) -> Tensor:
        self.runner.refresh(x, expected_rows=topk_ids.numel() / self.num_local_experts)
        schedule, segment_of_expert = self.chunks.schedule(x.shape[0], group, rules)
        chunks = f", {len(schedule.chunks)} chunk(s)" if self.ep_size > 1 else ""
        self._announce(f"{self.runner.describe()}, {row_ops.describe(x)}{chunks}")
        plan = plan_routes(topk_ids, segment_of_expert)
        exchange = None
        if self.ep_size > 1:
            needs = find_needs(x, (topk_weights,), self.experts.parameters())
            arguments = (group, rules, self._attendance(group))
            exchange = CountExchange(
                plan.tokens_per_segment, *arguments, dtype=x.dtype, needs=needs
            )
        return pipelined_forward(
            x, topk_weights, plan, self.runner, schedule, exchange, self._timed
        )

    def _run_reference(
        self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, group: Any, rules: InputRules
    ) -> Tensor:
        self._announce("plain PyTorch")
        exchange = None
        if self.ep_size > 1:
            count = topk_ids.new_full((1,), x.shape[0])
            needs = find_needs(x, (topk_weights,), self.experts.parameters())
            arguments = (group, rules, self._attendance(group))
            exchange = CountExchange(count, *arguments, dtype=x.dtype, needs=needs)
        return reference_forward(
            x,
            topk_ids,
            topk_weights,
            self.expert_modules(),
            exchange=exchange,
            num_local_experts=self.num_local_experts,
            container=self.runner.container,
        )

    def _group(self) -> Any:
        """Return the EP group, the world where DeepSpeed's inference engine set none."""
        if self.ep_size == 1 or self.ep_group is not None:
            return self.ep_group
        found = expert_parallel_groups().get(self.ep_group_name)
        if found is not None:  # a copy of a layer that has one
            return found
        if not dist.is_initialized() or dist.get_world_size() != self.ep_size:
            raise RuntimeError(
                f"ep_size is {self.ep_size}: call set_deepspeed_parallelism() before the first "
                "forward (deepspeed.initialize does)"
            )
        return dist.get_world_group()

    def _input_rules(
        self, weights: ExpertWeights | Refusal | None = None, *, is_fresh: bool = False
    ) -> InputRules:
        """Return what the input must be.

        Args:
            weights: of the experts; where the fused path knows them, their dtype is the input's and
                the rules of the last forward hold as long as nothing differs.
            is_fresh: look at the experts again; those that are no recognised MLPs decide themselves
                what they take, as in DeepSpeed.
        """
        wg, rules = self._weight(), self._rules
        takes_used_token = self.overrides.gate is None and self.gate.k == 1
        if isinstance(weights, ExpertWeights):
            facts = self.hidden_size, weights.dtype, wg.device, takes_used_token
            if rules is not None and rules.facts == facts:
                return rules
        else:
            dtypes = parameter_dtypes(next(iter(self.expert_modules()), self.experts))
            is_open = (
                len(dtypes) != 1
                or torch.is_autocast_enabled(wg.device.type)
                or (is_fresh and not self.runner.are_mlps())
            )
            dtype = None if is_open else dtypes.pop()
            facts = self.hidden_size, dtype, wg.device, takes_used_token
        self.__dict__["_rules"] = rules = InputRules(*facts)
        return rules

    def _weight(self) -> Tensor:
        """Return a weight on the layer's device: the gate's, where it has DeepSpeed's."""
        if type(self.gate) is TopKGate:
            return self.gate.wg.weight
        params = itertools.chain(self.gate.parameters(), self.experts.parameters())
        return next(params, torch.empty(0))

    def _raise_everywhere(
        self,
        fault: tuple[int, int],
        rules: InputRules,
        group: Any,
        exchange: Exchange | Refusal | None,
    ) -> None:
        """Raise, after telling the peers, which wait for this rank's answer or counts."""
        if isinstance(exchange, Exchange):
            assert exchange.host_status is not None, "connect() makes one"
            answers = exchange.host_status.exchange(RankStatus(0, False, fault))
            rules.raise_first([answer.fault for answer in answers])
        elif self.ep_size > 1:
            size = 1
            if self.path != "reference":
                size = self.chunks.schedule(0, group, rules)[0].num_segments
            counts = torch.zeros(size, dtype=torch.int64, device=rules.device)
            CountExchange(counts, group, rules, self._attendance(group), fault=fault).wait()
        raise ValueError(rules.message(*fault))

    def _announce(self, how: str) -> None:
        """Say which path runs, once for all layers alike, and again if it changes."""
        how += self.overrides.describe()
        if how == self._announced:
            return
        self._announced = how
        why = "" if self.config.path == "auto" else ", pinned by the configuration"
        if self._reason is not None:
            why = f" (not fused: {self._reason})"
        warn_once(f"comet_ds: MoE path {self.path}{why}: {how}")

    def _timed(self, name: str) -> AbstractContextManager[None]:
        return running_timer(self.timers, name) if self.wall_clock_breakdown else _NO_CONTEXT
