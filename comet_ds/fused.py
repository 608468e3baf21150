# SPDX-License-Identifier: Apache-2.0
"""The fused path: a rank's experts on the kernels of csrc, forward and backward.

One token's way, with the rows of ``fused_call.py``; csrc/moe/layer_call.cpp has the launches:

    forward    x -> dispatch -> up + activation -> down -> combine -> output
    backward   grad -> dispatch -> down, weight and activation -> up -> combine -> x.grad;
               weight gradients

Saved for backward are the dispatched rows, the pre-activations and the plan; the rest is computed
again in the epilogue that needs it. No step waits on the host, but the first after parameters have
moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from comet_ds.exchange import Exchange, ExposureMeter
from comet_ds.expert_weights import (
    ALIGNMENT_BYTES,
    ExpertWeights,
    MatrixGrads,
    Pass,
    why_not_addressable,
)
from comet_ds.experts import ExpertMLP, RecognisedExperts
from comet_ds.fused_call import CallSizes, PreparedCall, layer_shape, prepare_call
from comet_ds.gate import Routing, TopKGate
from comet_ds.gradients import BackwardNeeds, first_order_only
from comet_ds.kernels import current_stream, load_kernels, why_no_kernels
from comet_ds.overlap import Division, LayerShape
from comet_ds.refine import Trial

DTYPES = (torch.bfloat16, torch.float16)
MAX_PREPARED = 64  # sizes of a layer whose launches are kept


@dataclass(frozen=True)
class FusedCall:
    """One forward of a layer and its backward.

    Attributes:
        prepared: the launches.
        trial: the CTA splits to measure, if any are.
        meter: of what communication takes from computation, if anyone asks.
        side_stream: address of the stream of copies that run meanwhile, 0 on one rank.
        needs: gradients that any rank needs; None on one rank.
    """

    prepared: PreparedCall
    trial: Trial | None = None
    meter: ExposureMeter | None = None
    side_stream: int = 0
    needs: BackwardNeeds | None = None

    def events(self, gemm: Pass) -> tuple[int, int]:
        """Return the events to record around a launch beside which ranks communicate."""
        return (0, 0) if self.trial is None else self.trial.events(gemm)

    def exposure(self, direction: int) -> int:
        """Return where kernels note what communication takes; 0 forward, 1 backward."""
        # A graph would add to the meter's memory long after its end.
        if self.meter is None or torch.cuda.is_current_stream_capturing():
            return 0
        return self.meter.begin(direction)


class FusedExperts:
    """The local experts of one layer on the fused path.

    Attributes:
        experts: the layer's modules; looked at again on every call.
        weights: their matrices; another object when they have changed, None before the first call.
        shape, division: layer shape and CTA split of the last forward; None on a single rank.
        meter: of what communication takes from computation, while anyone asks.
    """

    def __init__(self, experts: Sequence[nn.Module]) -> None:
        self.experts = experts
        self._recognised = RecognisedExperts()
        self.weights: ExpertWeights | None = None
        self._prepared: dict[Any, PreparedCall] = {}
        self.shape: LayerShape | None = None
        self.division: Division | None = None
        self.meter: ExposureMeter | None = None

    def __reduce__(self) -> tuple[type, tuple]:
        """Make tables anew in copies."""
        return FusedExperts, (self.experts,)

    def why_not(self, x: Tensor) -> str | None:
        """Return why the experts cannot take the fused path with this input, None where they can.

        Looks at the experts: cheap as long as they have not changed.
        """
        if x.device.type != "cuda":
            return f"it needs a CUDA device, not {x.device.type}"
        if x.dtype not in DTYPES:
            return f"it needs bfloat16 or float16, not {x.dtype}"
        if torch.is_autocast_enabled(x.device.type):
            return "it does not know autocast"
        kernels = load_kernels(x.device)
        if kernels is None:
            return f"it has no kernels: {why_no_kernels()}"
        mlps = self._recognised.find(self.experts, kernels.ModuleWatch)
        if isinstance(mlps, str):
            return mlps
        if not kernels.can_plan(len(mlps), 1):
            return f"a plan has no room for {len(mlps)} experts"
        if not self._fits(mlps, x):
            self.weights = None
            self._prepared.clear()
            if reason := why_not_addressable(mlps, x):
                return reason
            self.weights = ExpertWeights(mlps, kernels)
        return None

    def _fits(self, mlps: Sequence[ExpertMLP], x: Tensor) -> bool:
        """Whether the tables made last are right for these experts and this input."""
        weights = self.weights
        return (
            weights is not None
            and weights.mlps == mlps  # train and eval mode have lists of their own, often equal
            and (weights.dtype, weights.device) == (x.dtype, x.device)
            and weights.is_current()
        )

    def describe(self) -> str:
        """Return a phrase for the log line."""
        stacked = "stacked " if self.weights.weights["up"].is_stacked else ""
        return f"{stacked}{self.weights.mlps[0].describe()} experts"

    def begin(
        self,
        x: Tensor,
        exchange: Exchange | None,
        num_tokens: tuple[int, ...],
        gate: TopKGate,
        needs: BackwardNeeds | None = None,
    ) -> tuple[Tensor, FusedCall]:
        """Send the input on its way to the other ranks while the gate runs.

        Args:
            x: [T, H], what ``why_not`` has accepted.
            exchange: of the expert parallel group, whose ranks all make this call; None where all
                experts are local.
            num_tokens: T of every rank of the group.
            gate: the layer's.
            needs: gradients that any of the ranks needs; None where all experts are local.

        Returns:
            The input as ``run`` reads it, and what ``run`` is to be given.
        """
        x = _aligned(x)
        capacities = None
        if gate.drop_tokens:
            by_count = {count: gate.capacity(count) for count in set(num_tokens)}
            capacities = tuple(by_count[count] for count in num_tokens)
        sizes = CallSizes(num_tokens, capacities, gate.k, gate.wg.weight.shape[0])
        if exchange is None:
            return x, FusedCall(self._prepare(sizes))
        trial = None
        if exchange.tuner is not None:
            shape = layer_shape(self.weights, sizes, exchange.memory.rank)
            trial = exchange.trial(shape, needs.has_any and needs.absent is None)
        prepared = self._prepare(sizes, exchange, trial)
        self.shape, self.division = prepared.shape, prepared.division
        stream, side_stream = exchange.enter()
        prepared.forward.begin(tokens=x, stream=stream, side_stream=side_stream)
        return x, FusedCall(prepared, trial, self.meter, side_stream, needs)

    def _prepare(
        self, sizes: CallSizes, exchange: Exchange | None = None, trial: Trial | None = None
    ) -> PreparedCall:
        """Return the launches of some sizes, remembered as long as nothing moves."""
        if exchange is None:
            key, division = sizes, None
        else:
            division = trial.division if trial is not None else exchange.division
            key = exchange, sizes, division, exchange.generation
        if (found := self._prepared.get(key)) is None:
            if exchange is not None and division is None:
                shape = layer_shape(self.weights, sizes, exchange.memory.rank)
                division = exchange.trial(shape, has_backward=True).division
            if len(self._prepared) >= MAX_PREPARED:
                self._prepared.clear()
            found = prepare_call(self.weights, sizes, exchange, division)
            if exchange is not None:  # the memory may have grown for it
                key = (*key[:3], exchange.generation)
            self._prepared[key] = found
        return found

    def _has_backward(self, *inputs: Tensor) -> bool:
        needed = (*inputs, *self.weights.parameters)
        return torch.is_grad_enabled() and any(t.requires_grad for t in needed)

    def run(self, routing: Routing, call: FusedCall) -> Tensor:
        """Compute the layer's output for this rank's tokens.

        Args:
            routing: from the CUDA gate, of what ``begin`` has returned.
            call: what ``begin`` has returned.

        Returns:
            [T, H] in the tokens' dtype. Gradients for them, the routing weights and every expert
            parameter; the same input gives the same bits.
        """
        weights = routing.topk_weights
        has_backward = self._has_backward(routing.tokens, weights)
        if not has_backward and call.needs is not None and call.needs.has_any:
            # Another rank's backward needs this one's: it is attached, whatever is needed here.
            has_backward = torch.is_grad_enabled()
            weights = weights.detach().requires_grad_(has_backward)
        inputs = (routing.tokens, weights, routing, call, has_backward)
        return _FusedMLP.apply(*inputs, *call.prepared.weights.parameters)


_NO_GRADS = MatrixGrads(None, None)


class _FusedMLP(torch.autograd.Function):
    """Dispatch, experts and combine, as one node of the graph."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        topk_weights: Tensor,
        routing: Routing,
        call: FusedCall,
        has_backward: bool,
        *parameters: Tensor,
    ) -> Tensor:
        prepared, weights = call.prepared, call.prepared.weights
        launches = prepared.forward
        workspace = x.new_empty(launches.workspace_bytes, dtype=torch.uint8)
        rows = x.new_empty(prepared.max_rows, weights.hidden)
        hidden = x.new_empty(prepared.max_rows, weights.ffn)
        pre = (
            [torch.empty_like(hidden) for _ in range(1 + weights.is_gated)] if has_backward else ()
        )
        results, output = torch.empty_like(rows), torch.empty_like(x)
        is_pulling = prepared.division is not None and not prepared.division.is_sent
        launches.forward(
            tokens=x,
            topk_ids=routing.topk_ids,
            topk_weights=topk_weights.contiguous(),
            ranks=routing.ranks,
            kept_counts=routing.kept_counts,
            workspace=workspace,
            rows=rows,
            hidden=hidden,
            pre=pre,
            results=results,
            output=output,
            events=(call.events(Pass.UP) if is_pulling else (0, 0), call.events(Pass.DOWN)),
            exposure=call.exposure(0),
            stream=current_stream(x),
            side_stream=call.side_stream,
        )
        if has_backward:
            ctx.call, ctx.versions = call, [p._version for p in parameters]
            ctx.pending = weights.uses.begin()
            ctx.save_for_backward(workspace, rows, *pre)
        return output

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        workspace, rows, *pre = ctx.saved_tensors
        call, prepared = ctx.call, ctx.call.prepared.current()
        if call.needs is not None:
            call.needs.check_present()
        weights, launches = prepared.weights, prepared.backward
        _check_unchanged(weights, ctx.versions)
        grad = _aligned(grad)
        if prepared.has_peers:
            prepared.exchange.enter()
        common = {"workspace": workspace, "stream": current_stream(grad)}
        exposure = call.exposure(1)
        # Nobody reads the pre-activations again, unless the graph is kept: their gradients take
        # their place.
        is_kept = torch._C._autograd._get_current_graph_task_keep_graph()
        grad_pre = [torch.empty_like(p) for p in pre] if is_kept else pre
        grad_rows = torch.empty_like(rows)
        weighted_hidden = torch.empty_like(pre[0])
        fp32 = {"dtype": torch.float32}
        row_dots = rows.new_empty(launches.num_row_dots, prepared.max_rows, **fp32)
        grad_weights = rows.new_empty(grad.shape[0], prepared.sizes.top_k, **fp32)
        needs_parameters = any(ctx.needs_input_grad[5:])
        accumulators = []
        if weights.uses.is_single and not is_kept:
            accumulators = [node for node, _ in ctx.next_functions[-len(weights.parameters) :]]
        grads = {"down": weights.new_grads("down", accumulators)} if needs_parameters else {}
        of_down = grads.get("down", _NO_GRADS)
        launches.backward_down(
            grad=grad,
            grad_rows=grad_rows,
            pre=pre,
            grad_pre=grad_pre,
            weighted_hidden=weighted_hidden,
            row_dots=row_dots,
            grad_weights=grad_weights,
            grad_down=of_down.weight,
            grad_down_bias=of_down.bias,
            adds_to_down=of_down.is_added,
            events=call.events(Pass.DOWN_GRAD),
            exposure=exposure,
            **common,
        )
        del weighted_hidden, row_dots  # before the next is allocated
        grad_x = None
        has_dx = ctx.needs_input_grad[0] or prepared.has_peers
        names = dict(zip(weights.names, grad_pre, strict=False)) if needs_parameters else {}
        # One weight gradient is long enough to hide the results' way; alone, there is no such way.
        first = next(iter(names)) if prepared.has_peers and names else None
        if first is not None:
            grads[first] = weights.new_grads(first, accumulators)
        of_first = grads.get(first, _NO_GRADS)
        launches.backward_up(
            grad_pre=grad_pre,
            rows=rows,
            grad_rows=grad_rows if has_dx else None,  # down's gradient has been used
            grad_first=of_first.weight,
            grad_first_bias=of_first.bias,
            adds_to_first=of_first.is_added,
            events=call.events(Pass.WEIGHT_GRAD) if first is not None else (0, 0),
            exposure=exposure,
            **common,
        )
        if first is not None:
            _free(names.pop(first))
        if has_dx:
            grad_x = torch.empty_like(grad)
            given = {"grad_rows": grad_rows, "grad_tokens": grad_x, "grad_weights": grad_weights}
            launches.sum_grads(**given, exposure=exposure, **common)
        del grad_rows
        for name, of_matrix in names.items():
            found = grads[name] = weights.new_grads(name, accumulators)
            given = {"a": of_matrix, "b": rows, "grad": found.weight, "grad_bias": found.bias}
            launches.weight_grad(**given, adds=found.is_added, is_down=False, **common)
            _free(of_matrix)
        for found in grads.values():
            found.hand_over()
        if not is_kept:
            ctx.pending.end()
        return grad_x, grad_weights, None, None, None, *weights.grads_in_order(grads)


def _aligned(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor whose rows can be read 16 bytes at a time."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT_BYTES else tensor


def _free(tensor: Tensor) -> None:
    """Free memory to which autograd still has a reference."""
    tensor.untyped_storage().resize_(0)


def _check_unchanged(weights: ExpertWeights, versions: Sequence[int]) -> None:
    """Refuse weights changed or moved since forward, as autograd refuses saved tensors."""
    if [p._version for p in weights.parameters] != versions or not weights.is_in_place():
        raise RuntimeError(
            "an expert parameter needed for gradient computation has been modified in place or "
            "moved between forward and backward"
        )
