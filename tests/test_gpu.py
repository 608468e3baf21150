# SPDX-License-Identifier: Apache-2.0
"""The layer on GPUs: the fast path runs, agrees with DeepSpeed and fp64, and does not wait."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from helpers.distributed import World
from helpers.experts_zoo import GatedMLP, TupleMLP, randomize, sequential
from helpers.parity import build, oracle, run
from helpers.tolerance import CURVE_ENDS, CURVE_NOISE, ERROR_RATIO, assert_close, relative_error
from helpers.training import build_engine, config, train

from comet_ds import MoE
from comet_ds.pipelined import row_ops

HIDDEN, FFN = 64, 96
EXPERTS = {
    "gated": lambda: GatedMLP(HIDDEN, FFN),
    "two matrices, biases": lambda: sequential(HIDDEN, FFN),
    "not recognised": lambda: TupleMLP(HIDDEN, FFN),
}


def tokens(rank: int, num_tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(100 + rank)
    return tuple(torch.randn(num_tokens, HIDDEN, device="cuda").to(dtype) for _ in range(2))


def check(rank: int, size: int, name: str, dtype: torch.dtype, k: int, num_tokens: int) -> None:
    """Compare with DeepSpeed, with dropping, and with fp64, without."""
    x, grad = tokens(rank, num_tokens, dtype)
    common = dict(expert=EXPERTS[name](), ep_size=size, k=k, dtype=dtype, device="cuda")
    common["parallel"] = size > 1
    theirs = run(build(DeepSpeedMoE, rank, **common), x, grad)
    pipelined = {"path": "pipelined", "exact_gate": True}
    for block in (
        {"exact_gate": True},
        pipelined,
        {**pipelined, "num_chunks": 3},
        {**pipelined, "grouped_gemm": False},
        {"path": "reference", "exact_gate": True},
    ):
        layer = build(MoE, rank, **common, comet_ds=block)
        got = run(layer, x, grad)
        for what, value in theirs.items():
            assert_close(got[what], value, f"{name} {dtype} {k=} {block}: {what}")
        can_fuse = dtype != torch.float32 and name != "not recognised"
        if "path" not in block:
            assert layer.deepspeed_moe.path == ("fused" if can_fuse else "pipelined")
        if block == pipelined:
            grouped = layer.deepspeed_moe.runner.reason is None
            assert grouped == (dtype == torch.bfloat16 and name != "not recognised")
            assert row_ops.describe(x) == "CUDA row kernels"
            again = run(layer, x, grad)
            assert all(torch.equal(again[what], value) for what, value in got.items())
    layer = build(MoE, rank, **common, drop_tokens=False, comet_ds={"exact_gate": True})
    theirs = run(build(DeepSpeedMoE, rank, **common, drop_tokens=False), x, grad)
    got = run(layer, x, grad)
    experts = [randomize(EXPERTS[name](), i).to("cuda", dtype).double() for i in range(8)]
    truth = oracle(layer, x, grad, experts)
    for what in ("output", "grad of x"):
        error, limit = (relative_error(r[what], truth[what]) for r in (got, theirs))
        assert error <= ERROR_RATIO * limit, f"{name} {dtype} {k=}: {what}: {error} > 1.5 * {limit}"


@pytest.mark.gpu(1)
@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_one_rank(name: str, dtype: torch.dtype, k: int) -> None:
    for num_tokens in (63, 512):
        check(0, 1, name, dtype, k, num_tokens)


@pytest.mark.gpu(2)
@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_two_ranks(world, name: str, dtype: torch.dtype) -> None:
    for k in (1, 2, 4):
        world(2, "nccl").run(check, name, dtype, k, 129)


def check_no_synchronisation(layer: MoE, rank: int) -> None:
    x, grad = tokens(rank, 256, torch.bfloat16)
    run(layer, x, grad)  # builds the kernels and torch's distributions
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        output, l_aux, _ = layer(x.requires_grad_())
        torch.autograd.backward([output, l_aux], [grad, torch.ones_like(l_aux)])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu(1)
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("path", ["fused", "pipelined"])
def test_no_host_synchronisation(path: str, k: int) -> None:
    common = dict(expert=EXPERTS["gated"](), k=k, dtype=torch.bfloat16, device="cuda")
    layer = build(MoE, 0, **common, comet_ds={"path": path})
    check_no_synchronisation(layer, 0)


@pytest.mark.gpu(1)
def test_no_tokens() -> None:
    for path in ("fused", "pipelined"):
        common = dict(expert=EXPERTS["gated"](), k=2, dtype=torch.bfloat16, device="cuda")
        layer = build(MoE, 0, **common, comet_ds={"path": path})
        result = run(layer, *tokens(0, 0, torch.bfloat16))
        assert layer.deepspeed_moe.path == path
        assert all(t.abs().sum() == 0 for n, t in result.items() if n.startswith("grad"))


@pytest.mark.gpu(1)
@pytest.mark.parametrize("path", ["fused", "pipelined"])
def test_changed_experts_are_noticed(path: str) -> None:
    """Kernels must not go on with matrices, or past hooks, that came later."""
    common = dict(expert=EXPERTS["gated"](), k=2, dtype=torch.bfloat16, device="cuda")
    layer = build(MoE, 0, **common, comet_ds={"path": "auto" if path == "fused" else path})
    x = tokens(0, 64, torch.bfloat16)[0]
    assert layer(x)[0].abs().sum() > 0 and layer.deepspeed_moe.path == path
    for expert in layer.deepspeed_moe.experts.deepspeed_experts:
        expert.w2 = torch.nn.Linear(FFN, HIDDEN, bias=False).to("cuda", torch.bfloat16)
        torch.nn.init.zeros_(expert.w2.weight)
    assert layer(x)[0].abs().sum() == 0 and layer.deepspeed_moe.path == path
    expert.register_forward_hook(lambda module, args, output: output + 1)
    layer(x)
    assert layer.deepspeed_moe.path == "pipelined"
    assert "hooks" in layer.deepspeed_moe.runner.reason


def check_no_wait(rank: int, size: int) -> None:
    """Pipelined, the one wait is for the counts' event; nothing else synchronises."""
    common = dict(expert=EXPERTS["gated"](), ep_size=size, k=2, dtype=torch.bfloat16)
    common |= dict(device="cuda", parallel=True, comet_ds={"path": "pipelined"})
    layer = build(MoE, rank, **common)
    check_no_synchronisation(layer, rank)


@pytest.mark.gpu(2)
def test_two_ranks_wait_for_the_counts_alone(world) -> None:
    world(2, "nccl").run(check_no_wait)


def check_uneven(rank: int, size: int, num_tokens: list[int]) -> None:
    x, grad = tokens(rank, num_tokens[rank], torch.bfloat16)
    common = dict(expert=EXPERTS["gated"](), ep_size=size, k=2, dtype=torch.bfloat16)
    common |= dict(device="cuda", parallel=True, drop_tokens=False)
    layer = build(MoE, rank, **common)
    got = run(layer, x, grad)
    experts = [randomize(EXPERTS["gated"](), i).cuda().bfloat16().double() for i in range(8)]
    truth = oracle(layer, x, grad, experts)
    for what in ("output", "grad of x"):
        assert relative_error(got[what], truth[what]) < 2e-2
    reference = run(build(MoE, rank, **common, comet_ds={"path": "reference"}), x, grad)
    for what, value in reference.items():
        assert_close(got[what], value, f"{num_tokens}: {what}")


@pytest.mark.gpu(2)
@pytest.mark.parametrize("num_tokens", [[1, 129], [0, 63], [0, 0]], ids=str)
def test_uneven_tokens(world, num_tokens: list[int]) -> None:
    world(2, "nccl").run(check_uneven, num_tokens)


def check_stream(rank: int, size: int) -> None:
    """A user's own stream, many steps with changing routing, no synchronisation in between."""
    common = dict(expert=EXPERTS["gated"](), ep_size=size, k=4, dtype=torch.bfloat16)
    layer = build(MoE, rank, **common, device="cuda", parallel=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    sizes = [64 + 17 * (step % 5) for step in range(60)]
    results = []
    with torch.cuda.stream(stream):
        for step, num_tokens in enumerate(sizes):
            x, grad = tokens(step % 5, num_tokens, torch.bfloat16)
            results.append(run(layer, x, grad))
    stream.synchronize()
    for step in range(5, 60):
        for what, value in results[step % 5].items():
            assert torch.equal(results[step][what], value), f"step {step}: {what}"


@pytest.mark.gpu(2)
def test_own_stream_and_many_steps(world) -> None:
    world(2, "nccl").run(check_stream)


def check_fault(rank: int, size: int) -> str:
    layer = build(MoE, rank, ep_size=size, k=2, device="cuda", parallel=True)
    x = torch.randn(8, 17 if rank else 16, device="cuda")
    try:
        layer(x)
    except ValueError as error:
        layer(torch.randn(8, 16, device="cuda"))[0].sum().item()
        return str(error)
    return "no error"


@pytest.mark.gpu(2)
def test_bad_input_on_one_rank(world) -> None:
    for answer in world(2, "nccl").run(check_fault):
        assert "hidden size 16, got 17" in answer


def check_curve(
    rank: int, size: int, settings: dict[str, Any], dtype: torch.dtype
) -> list[tuple[float, ...]]:
    """Return the first and the last ten losses' means: DeepSpeed's, with noise, and ours."""
    means = []
    for kind, disturbance in (("deepspeed", 0), ("deepspeed", 1), ("comet_ds", 0)):
        engine = build_engine(kind, config(size, **settings), ep_size=size, k=2)
        losses = torch.tensor(train(engine, rank, 50, dtype, disturbance))
        means.append((losses[:10].mean().item(), losses[-10:].mean().item()))
        engine.destroy()
    return list(zip(*means, strict=True))


PRECISIONS = {
    "fp32": ({}, torch.float32),
    "bf16": ({"bf16": {"enabled": True}}, torch.bfloat16),
    "fp16": ({"fp16": {"enabled": True, "initial_scale_power": 8}}, torch.float16),
}


def compare_curves(ranks: World, precision: str, **settings: Any) -> None:
    """Losses fall, and are those with DeepSpeed's layer, on every rank."""
    block, dtype = PRECISIONS[precision]
    for start, end in ranks.run(check_curve, {**settings, **block}, dtype):
        assert end[0] < 0.9 * start[0]
        for (theirs, noisy, ours), limit in zip((start, end), CURVE_ENDS, strict=True):
            noise = abs(noisy - theirs) / theirs
            assert ours == pytest.approx(theirs, rel=max(limit, CURVE_NOISE * noise)), noise


@pytest.mark.gpu(1)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", [1, 2])
def test_training_fused(world, stage: int, precision: str) -> None:
    zero = {"stage": stage}
    ranks = world(1, "nccl")
    compare_curves(ranks, precision, zero_optimization=zero, comet_ds={"path": "fused"})


@pytest.mark.gpu(2)
@pytest.mark.parametrize("path", ["auto", "pipelined"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", [1, 2])
def test_training(world, stage: int, precision: str, path: str) -> None:
    zero = {"stage": stage, "overlap_comm": True}
    ranks = world(2, "nccl")
    compare_curves(ranks, precision, zero_optimization=zero, comet_ds={"path": path})


@pytest.mark.gpu(2)
@pytest.mark.parametrize("stage", [1, 2])
def test_training_in_micro_batches(world, stage: int) -> None:
    settings = {"zero_optimization": {"stage": stage}, "gradient_accumulation_steps": 3}
    compare_curves(world(2, "nccl"), "bf16", comet_ds={"path": "fused"}, **settings)
