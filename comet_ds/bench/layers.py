# SPDX-License-Identifier: Apache-2.0
"""One layer compared with DeepSpeed's: checked, then timed with its gate and its kernels.

Layers are bf16, in one expert parallel group over all ranks. DeepSpeed's layer gets the same input
and weights as ours. Nothing is timed before our output and gradients are as close to fp32 as
DeepSpeed's; with several ranks, before output and input gradient agree with DeepSpeed's. Runs are
interleaved. Figures are medians; with several ranks, the slowest rank's.

A layer has two times. `wall` starts on an idle GPU and includes the host. For `device` the GPU is
kept busy until the host has enqueued everything, as in a model that is not bound by its host. Both
include the gate. Kernels and the gate alone are timed on the device, on one rank only. The limit
is the time of the experts' GEMMs at ``limit_flops`` (comet_ds/tuning/hardware.py). Memory is what
a step allocates: `saved` is held between forward and backward; `peak` is the maximum, with the
parameters' gradients (`grads`).

With several ranks on the fused path, `hidden` is the share of communication that computation hides:
1 - (T - T_compute) / T_exchange. T is the layer's time. T_compute is that of a layer with the same
gate whose experts are all on its own rank, as many as a rank has of the real layer. T_exchange is
what the other ranks add to the time of a layer that has nothing to hide communication behind: it
has no gate, and its experts have F = 8.

A skew makes gates prefer some experts, until the shares of the routes have that standard deviation
in our layer and DeepSpeed's; there is no `hidden` then. AutoEP's gate gets the same preference, but
where k is 2 the other layers draw second experts at random, so AutoEP's shares deviate more.
"""

from __future__ import annotations

import copy
import functools
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed import comm as dist
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from torch import Tensor, nn

from comet_ds.bench.peers import AutoEP, build, draw_tokens, fix_routing, moe_of, skew_routing, step
from comet_ds.bench.shapes import Shape
from comet_ds.bench.timing import Timer, slowest_rank, time_functions
from comet_ds.fused.call import CallSizes, plan_of, prepare_call
from comet_ds.fused.peer.layout import TABLES
from comet_ds.gate.routing import Routing
from comet_ds.layer import MoE
from comet_ds.reference import reference_moe
from comet_ds.tuning.hardware import H200

# Largest ratio of our error against fp32 to DeepSpeed's.
ERROR_RATIO = 1.5
MIB = 2**20


def check(
    layers: Mapping[str, DeepSpeedMoE], shape: Shape, x: Tensor, grad: Tensor
) -> dict[str, Any]:
    """Compare our layer's and DeepSpeed's output and expert gradients with fp32.

    Returns:
        relative errors by layer.

    Raises:
        AssertionError: our error is too large.
    """
    errors: dict[str, Any] = {}
    for name, layer in layers.items():
        torch.manual_seed(7)
        results = step(layer, x, grad)
        if dist.get_world_size() > 1:  # the oracle would need the weights of all ranks
            errors[name] = results
            layer.zero_grad(set_to_none=True)
            continue
        ours = moe_of(layers["comet_ds"]).routing
        experts = moe_of(layer).experts.deepspeed_experts
        got = [results[0], *(p.grad for p in experts.parameters())]
        oracle = copy.deepcopy(experts).float()
        expected, _ = reference_moe(x.float(), ours.topk_ids, ours.topk_weights, oracle)
        expected.backward(grad.float())
        truth = [expected.detach(), *(p.grad for p in oracle.parameters())]
        errors[name] = [
            _relative_error(got[:1], truth[:1]),
            _relative_error(got[1:], truth[1:]),
        ]
        layer.zero_grad(set_to_none=True)
    if dist.get_world_size() > 1:
        pairs = zip(errors["comet_ds"], errors["deepspeed"], strict=True)
        differences = [_relative_error([ours], [theirs]) for ours, theirs in pairs]
        assert max(differences) < 2e-2, f"{shape}: the layers differ by {differences}"
        return {"difference": differences}
    for what, ours, theirs in zip(("output", "gradients"), *_pair(errors), strict=True):
        assert ours <= ERROR_RATIO * theirs, f"{shape}: {what}: error {ours:.1e}, not {theirs:.1e}"
    return errors


def _pair(by_layer: dict[str, Any]) -> tuple[Any, Any]:
    return by_layer["comet_ds"], by_layer["deepspeed"]


def _relative_error(got: list[Tensor], expected: list[Tensor]) -> float:
    pairs = zip(got, expected)  # noqa: B905
    difference = torch.stack([(g.float() - e.float()).square().sum() for g, e in pairs]).sum()
    size = torch.stack([e.float().square().sum() for e in expected]).sum()
    return (difference / size).sqrt().item()


def time_layers(
    layers: Mapping[str, nn.Module], x: Tensor, grad: Tensor, num_runs: int
) -> dict[str, dict[str, float]]:
    """Return times in ms and memory in MiB of every layer: medians, the largest of all ranks'."""
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in layers}
    for _ in range(num_runs):
        for name, layer in layers.items():
            found = samples[name]
            wall_ms = 0.0
            for kind in ("wall", "device"):
                timer = Timer(1.5 * wall_ms)
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                saved = []

                def middle(timer: Timer = timer, saved: list[int] = saved) -> None:
                    timer.mark()
                    saved.append(torch.cuda.memory_allocated())

                step(layer, x, grad, middle)
                timer.mark()
                forward, both = timer.read()
                wall_ms = max(wall_ms, both)
                values = {f"{kind}_forward_ms": forward, f"{kind}_both_ms": both}
                values["saved_mib"] = (saved[0] - before) / MIB
                values["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / MIB
                for key, value in values.items():
                    found.setdefault(key, []).append(value)
                layer.zero_grad(set_to_none=True)
    keys = list(next(iter(samples.values())))
    medians = [[statistics.median(found[key]) for key in keys] for found in samples.values()]
    largest = slowest_rank(medians, x.device)
    return {
        name: dict(zip(keys, row, strict=True)) for name, row in zip(samples, largest, strict=True)
    }


def time_hidden(
    layer: MoE, shape: Shape, x: Tensor, grad: Tensor, num_runs: int, options: dict[str, Any]
) -> dict[str, dict[str, float]] | None:
    """Return the hidden share and the times it is made of, for "forward" and for "both".

    None where a rank has fewer experts than a token has routes.
    """
    alone = replace(shape, num_experts=shape.num_experts // dist.get_world_size())
    if alone.num_experts < shape.top_k:
        return None
    layers = {
        "layer": layer,
        "compute": build(MoE, alone, ep_size=1, **options),
        "small": build(MoE, replace(shape, ffn=8), **options),
        "small alone": build(MoE, replace(alone, ffn=8), ep_size=1, **options),
    }
    for name, other in layers.items():
        step(other, x, grad)
        other.zero_grad(set_to_none=True)
        if name == "compute":
            fix_routing(other, layer.deepspeed_moe.gate.wg)
        elif name != "layer":
            fix_routing(other)
        assert other.deepspeed_moe.path == "fused", f"{name} is not fused"
    times = time_layers(layers, x, grad, num_runs)
    result = {}
    for part in ("forward", "both"):
        total, compute, small, small_alone = (times[n][f"device_{part}_ms"] for n in layers)
        exchange = small - small_alone
        hidden = 1 - (total - compute) / exchange
        result[part] = {"compute_ms": compute, "exchange_ms": exchange, "hidden": hidden}
    return result


def time_gates(ours: MoE, theirs: DeepSpeedMoE, x: Tensor, num_runs: int) -> dict[str, float]:
    """Return device times in ms of our gate and DeepSpeed's, logits included."""
    x = x.detach().requires_grad_()

    def route() -> tuple[Tensor, Tensor]:
        routing = ours.deepspeed_moe.gate.route(x)
        return routing.topk_weights, routing.l_aux

    def route_theirs() -> tuple[Tensor, Tensor]:
        l_aux, combine_weights, *_ = theirs.deepspeed_moe.gate(x, None)
        return combine_weights, l_aux

    def both(gate: Callable[[], tuple[Tensor, Tensor]]) -> None:
        results = gate()
        torch.autograd.backward(results, [torch.ones_like(t) for t in results])

    gates = {"gate": route, "deepspeed_gate": route_theirs}
    with torch.no_grad():
        forward = time_functions({f"{k}_forward_ms": g for k, g in gates.items()}, num_runs)
    backward = {f"{k}_both_ms": functools.partial(both, g) for k, g in gates.items()}
    return forward | time_functions(backward, num_runs)


def time_kernels(layer: MoE, shape: Shape, x: Tensor, num_runs: int) -> list[dict[str, Any]]:
    """Time every pass of our grouped GEMM and of torch's, on an even routing.

    Returns:
        one record for each pass: FLOP, the limit, our ms, TFLOP/s of both. torch's computes no
        activation, and only one of a gated expert's two matrices, so rates are to be compared.
    """
    weights, num_tokens = layer.deepspeed_moe.fused.weights, x.shape[0]
    routing = _even_routing(shape, num_tokens)
    capacities = None if routing.capacity is None else (routing.capacity,)
    sizes = CallSizes((num_tokens,), capacities, shape.top_k, shape.num_experts)
    prepared = prepare_call(weights, sizes)
    call, num_rows = prepared.launches.forward, prepared.max_rows

    def bf16(*size: int) -> Tensor:
        return torch.randn(size, device="cuda", dtype=torch.bfloat16)

    def fp32(*size: int) -> Tensor:
        return torch.empty(size, device="cuda")

    rows, results, grad_rows = (bf16(num_rows, shape.hidden) for _ in range(3))
    hidden, *wide = (bf16(num_rows, shape.ffn) for _ in range(3 + 2 * shape.gated))
    pre, grad_pre = wide[::2], wide[1::2]
    workspace = torch.empty(call.workspace_bytes, device="cuda", dtype=torch.uint8)
    common = {"workspace": workspace}
    forward = {name: getattr(routing, name) for name in TABLES} | common
    forward |= {"tokens": x, "rows": rows, "hidden": hidden, "pre": pre}
    forward |= {"results": results, "output": torch.empty_like(x)}
    call.forward(**forward, part="dispatch")
    down_grad = {"grad": x, "grad_rows": grad_rows, "pre": pre, "grad_pre": grad_pre, **common}
    down_grad |= {"weighted_hidden": hidden, "row_dots": fp32(call.num_row_dots, num_rows)}
    down_grad |= {"grad_weights": fp32(num_tokens, shape.top_k), "only_gemm": True}
    up_grad = {"grad_pre": grad_pre, "rows": rows, "grad_rows": results, "only_gemm": True}
    up, down = (weights.weights[name].params[0].detach() for name in ("up", "down"))  # stacks
    of_up = {"a": grad_pre[0], "b": rows, "grad": torch.empty_like(up), "is_down": False}
    of_down = {"a": grad_rows, "b": hidden, "grad": torch.empty_like(down), "is_down": True}
    offsets = plan_of(call, workspace)["expert_offsets"][1:].contiguous()
    num_ups, gmm = 1 + shape.gated, F.grouped_mm
    passes: list[tuple[str, int, Callable, Callable]] = [
        ("up", num_ups, lambda: call.forward(**forward, part="up"),
         lambda: gmm(rows, up.mT, offs=offsets)),
        ("down", 1, lambda: call.forward(**forward, part="down"),
         lambda: gmm(hidden, down.mT, offs=offsets)),
        ("down_grad", 1, lambda: call.backward_down(**down_grad),
         lambda: gmm(grad_rows, down, offs=offsets)),
        ("up_grad", num_ups, lambda: call.backward_up(**up_grad, **common),
         lambda: gmm(grad_pre[0], up, offs=offsets)),
        ("up weight_grad", 1, lambda: call.weight_grad(**of_up, **common),
         lambda: gmm(grad_pre[0].t(), rows, offs=offsets)),
        ("down weight_grad", 1, lambda: call.weight_grad(**of_down, **common),
         lambda: gmm(grad_rows.t(), hidden, offs=offsets)),
    ]  # fmt: skip
    functions = {f"{name} {who}": f for name, _, *pair in passes for who, f in zip("ct", pair)}  # noqa: B905
    times = time_functions(functions, num_runs)
    flop = shape.gemm_flop(num_tokens)
    return [
        {
            "pass": name,
            "flop": count * flop,
            "limit_ms": 1e3 * count * flop / H200.limit_flops,
            "ms": times[f"{name} c"],
            "tflops": count * flop / times[f"{name} c"] / 1e9,
            "torch_tflops": flop / times[f"{name} t"] / 1e9,
        }
        for name, count, *_ in passes
    ]


def _even_routing(shape: Shape, num_tokens: int) -> Routing:
    """Return a routing that gives all experts the same number of tokens."""
    routes = torch.arange(num_tokens * shape.top_k, device="cuda").view(num_tokens, shape.top_k)
    ids = routes % shape.num_experts
    counts = torch.bincount(ids.flatten(), minlength=shape.num_experts)
    return Routing(
        topk_ids=ids,
        topk_weights=torch.full_like(ids, 1 / shape.top_k, dtype=torch.float32),
        l_aux=torch.zeros((), device="cuda"),
        exp_counts=counts,
        capacity=int(counts.max()),
        slot_in_expert=(routes // shape.num_experts).int(),
        kept_counts=counts.int(),
    )


def bench(
    name: str,
    shape: Shape,
    num_tokens: int,
    num_runs: int,
    *,
    with_autoep: bool,
    skew: float = 0.0,
    **options: Any,
) -> dict[str, Any]:
    """Check and time one shape; return all figures, and print them on rank 0.

    Args:
        name: name of the shape, to print.
        shape: the layer's.
        num_tokens: tokens of a rank.
        num_runs: runs to take medians of.
        with_autoep: whether DeepSpeed's AutoEP is timed too.
        skew: standard deviation of the experts' shares of the routes; 0 leaves the gates alone.
        options: more arguments of our layer and, except ``comet_ds``, of DeepSpeed's.
    """
    x, grad = draw_tokens(shape, num_tokens)
    ours = build(MoE, shape, **options)
    theirs = build(DeepSpeedMoE, shape, **{k: v for k, v in options.items() if k != "comet_ds"})
    pair = {"comet_ds": ours, "deepspeed": theirs}
    layers: dict[str, nn.Module] = {**pair}
    if with_autoep and shape.gated:
        layers["autoep"] = AutoEP(shape)
    if skew:
        skew_routing(ours, [other for other in layers.values() if other is not ours], x, skew)
    errors = check(pair, shape, x, grad)
    if "autoep" in layers:
        step(layers["autoep"], x, grad)
    record: dict[str, Any] = {
        "shape": name,
        **asdict(shape),
        "num_tokens": num_tokens,
        "skew": skew,
        "path": ours.deepspeed_moe.path,
        "limit_forward_ms": shape.forward_limit_ms(num_tokens),
        "grads_mib": sum(p.numel() * 2 for p in ours.parameters()) / MIB,
        "errors": errors,
        "layers": time_layers(layers, x, grad, num_runs),
    }
    is_fused, has_peers = record["path"] == "fused", dist.get_world_size() > 1
    if is_fused and not has_peers:
        record["gate"] = time_gates(ours, theirs, x, num_runs)
    del theirs, pair
    layers.clear()
    if is_fused and not has_peers:
        record["kernels"] = time_kernels(ours, shape, x, num_runs)
    elif is_fused and not skew:  # with a skew, a rank would have another load when alone
        record["hidden_share"] = time_hidden(ours, shape, x, grad, num_runs, options)
    if dist.get_rank() == 0:
        print("\n".join(_lines(record)), flush=True)
    return record


def _lines(record: dict[str, Any]) -> Iterator[str]:
    """Yield the printed table of one shape."""
    limit = record["limit_forward_ms"]
    yield (
        f"\n{record['shape']}: H {record['hidden']}, F {record['ffn']}, E {record['num_experts']}, "
        f"k {record['top_k']}, {record['num_tokens']} tokens a rank, skew {record['skew']:g}, "
        f"path {record['path']}, "
        f"limit {limit:.2f} / {3 * limit:.2f} ms, grads {record['grads_mib']:.0f} MiB"
    )
    errors = "; ".join(
        f"{k} " + " ".join(f"{e:.1e}" for e in v) for k, v in record["errors"].items()
    )
    what = "input" if "difference" in record["errors"] else "expert"
    yield f"  relative errors (output, {what} gradients): {errors}"
    yield (
        "  layer      wall fwd      f+b   device fwd (x limit)   f+b (x limit)   saved    peak MiB"
    )
    for name, r in record["layers"].items():
        forward, both = r["device_forward_ms"], r["device_both_ms"]
        yield (
            f"  {name:10s} {r['wall_forward_ms']:8.2f} {r['wall_both_ms']:8.2f}   "
            f"{forward:10.2f} {forward / limit:9.2f} {both:8.2f} {both / (3 * limit):8.2f} "
            f"{r['saved_mib']:7.0f} {r['peak_mib']:11.0f}"
        )
    for part, r in (record.get("hidden_share") or {}).items():
        yield (
            f"  {part}: compute alone {r['compute_ms']:.2f} ms, exchange alone "
            f"{r['exchange_ms']:.2f} ms, hidden {r['hidden']:.0%}"
        )
    if "gate" in record:
        for name in ("gate", "deepspeed_gate"):
            forward, both = (record["gate"][f"{name}_{part}_ms"] for part in ("forward", "both"))
            yield f"  {name:17s} {forward:7.3f} ms, f+b {both:.3f} ms"
    for r in record.get("kernels", []):
        yield (
            f"  {r['pass']:17s} {r['ms']:7.3f} ms {r['tflops']:6.0f} TFLOP/s, "
            f"{r['ms'] / r['limit_ms']:.2f} x limit; "
            f"torch {r['torch_tflops']:4.0f}, ratio {r['tflops'] / r['torch_tflops']:.2f}"
        )
