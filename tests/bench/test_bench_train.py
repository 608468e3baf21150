# SPDX-License-Identifier: Apache-2.0
"""The whole-model bench on CPUs: all but what a device has to tell, which is read from a trace."""

from __future__ import annotations

import gc
import json
import math
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from comet_ds.bench import models as bench_models
from comet_ds.bench import train as bench_train
from comet_ds.bench.models import Run, Variant, Workload, load_example
from comet_ds.bench.profile import Activity, break_down, classify, covered_us, read_trace
from comet_ds.bench.train import Plan, check_training, ratios, summarise
from comet_ds.cli.bench_train import parse_args
from comet_ds.observe.flops import flop_per_token

SMALL = Workload(
    shape="small",
    hidden=32,
    ffn=48,
    experts=4,
    top_k=2,
    layers=2,
    heads=4,
    seq_len=16,
    batch=2,
    micro_batches=2,
    zero=1,
)
GPT_8 = dict(layers=8, heads=16, seq_len=1024, batch=8, micro_batches=4, zero=1)


@pytest.mark.parametrize(
    ("work", "num_weights", "step_ms", "tflops"),
    [
        # 8 x (4 x 2048^2 + 128 x 2048 + 8 x 3 x 2048 x 768 + 2048 x 1024) + 256 x 2048
        pytest.param(
            Workload("qwen3", 2048, 768, 128, 8, **GPT_8), 455_606_272, 684, 131, id="qwen3-30b"
        ),
        # 8 x (4 x 2048^2 + 64 x 2048 + 4 x 3 x 2048 x 1408 + 2048 x 1024) + 256 x 2048
        pytest.param(
            Workload("qwen2", 2048, 1408, 64, 4, **GPT_8), 429_391_872, 384, 220, id="qwen2-moe"
        ),
        # 2 x (4 x 4096^2 + 8 x 4096 + 2 x 3 x 4096 x 14336 + 4096 x 1024) + 256 x 4096
        pytest.param(
            Workload("mixtral", 4096, 14336, 8, 2, **{**GPT_8, "layers": 2}),
            848_363_520,
            267,
            625,
            id="mixtral-8x7b",
        ),
    ],
)
def test_flop_are_six_a_weight(
    work: Workload, num_weights: int, step_ms: float, tflops: float
) -> None:
    """Steps that were timed by hand before come out at the rates worked out by hand then."""
    assert work.flop_per_token(256) == 6 * num_weights
    assert work.num_tokens == 8 * 1024 * 4
    assert work.flop_per_token(256) * 32768 / step_ms / 1e9 == pytest.approx(tflops, abs=0.5)


def check_flop(rank: int, size: int) -> tuple[float, int]:
    example = load_example()
    run = Run(example, SMALL, Variant.parse("comet_ds"), Plan.config, 1)
    return flop_per_token(run.engine.module), example.NUM_BYTES


def test_flop_are_the_monitors_plus_attention(world) -> None:
    attention = 6 * SMALL.layers * SMALL.hidden * SMALL.seq_len
    [(counted, vocabulary), _] = world(2).run(check_flop)
    assert SMALL.flop_per_token(vocabulary) == counted + attention


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("void comet_ds::expert_gemm_kernel<comet_ds::Up>(comet_ds::UpParams)", "moe"),
        ("comet_ds::gate_logits_kernel(comet_ds::GateLogitsParams)", "moe"),
        ("comet_ds::rank_barrier_kernel(comet_ds::RankBarrierParams)", "communication"),
        ("void comet_ds::barrier_kernel<8>(comet_ds::Mailboxes)", "communication"),
        ("void cutlass::device_kernel<cutlass::gemm::GroupProblemShape<int>>(int)", "moe"),
        ("_swiglu_fwd_kernel", "moe"),
        (
            "void pytorch_flash::flash_fwd_kernel<cutlass::bfloat16_t>(Flash_fwd_params)",
            "attention",
        ),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", "gemm"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32", "gemm"),
        (
            "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::"
            "FusedOptimizerTensorListMetadata<4>, at::native::FusedAdamMathFunctor<float>>",
            "optimizer",
        ),
        ("void at::native::reduce_kernel<512, 1, at::native::NormTwoOps<float>>", "optimizer"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float>", "norm"),
        ("void at::native::GammaBetaBackwardCUDAKernel<float>", "norm"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel>", "copy"),
        ("Memcpy DtoD (Device -> Device)", "copy"),
        ("Memset (Device)", "copy"),
        ("Memcpy PtoP (Device -> Device)", "communication"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage)", "communication"),
        ("void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add<float>>", "other"),
    ],
)
def test_activities_have_kinds(name: str, kind: str) -> None:
    assert classify(name) == kind


def test_overlapping_time_counts_once() -> None:
    """By hand: [0, 4] and [2, 6] cover 6, [5, 6] nothing more, [8, 9] one more."""
    spans = [(2, 6), (8, 9), (0, 4), (5, 6)]
    assert covered_us(Activity("kernel", *span) for span in spans) == 7
    assert covered_us([]) == 0


def test_step_is_broken_down() -> None:
    """A product of 4 ms hides half of 4 ms of communication; 1 ms of other work, 1 ms idle."""
    activities = [
        Activity("ncclDevKernel_SendRecv", 2000, 6000),
        Activity("nvjet_tst", 0, 4000),
        Activity("some_kernel", 7000, 7400),
        Activity("some_kernel", 7400, 7900),
        Activity("another_kernel", 7900, 8000),
    ]
    profile = break_down(activities)
    assert profile.span_ms == 8 and profile.num_activities == 5
    assert profile.busy_ms == pytest.approx(7)
    found = {kind: ms for kind, ms in profile.kinds_ms.items() if ms}
    assert found == pytest.approx({"gemm": 4, "communication": 2, "other": 1, "idle": 1})
    assert profile.others_ms == pytest.approx({"some_kernel": 0.9, "another_kernel": 0.1})
    assert list(profile.others_ms) == ["some_kernel", "another_kernel"]
    with pytest.raises(ValueError, match="no activity"):
        break_down([])


def test_trace_is_read(tmp_path: Path) -> None:
    """Only what a device does counts: no host calls, no annotations, which span idle time too."""
    events = [
        {"ph": "X", "cat": "kernel", "name": "a", "ts": 1.5, "dur": 2.0},
        {"ph": "X", "cat": "gpu_memcpy", "name": "b", "ts": 4.0, "dur": 1.0},
        {"ph": "X", "cat": "gpu_memset", "name": "c", "ts": 6.0, "dur": 0.5},
        {"ph": "X", "cat": "gpu_user_annotation", "name": "step", "ts": 0.0, "dur": 9.0},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 0.0, "dur": 9.0},
        {"ph": "M", "name": "process_name"},
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    expected = [Activity("a", 1.5, 3.5), Activity("b", 4.0, 5.0), Activity("c", 6.0, 6.5)]
    assert read_trace(path) == expected


def test_options_follow_a_layers_name() -> None:
    variant = Variant.parse("comet_ds:path=pipelined:num_chunks=2:exact_gate=true")
    assert variant.moe == "comet_ds"
    assert variant.options == {"path": "pipelined", "num_chunks": 2, "exact_gate": True}
    assert Variant.parse("autoep:gate_up_impl=fused").options == {"gate_up_impl": "fused"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--moe", "comet_ds,tutel"], "unknown layer 'tutel', known: comet_ds, autoep, deepspeed"),
        (["--moe", "comet_ds:pipelined"], "an option must be key=value, got 'pipelined'"),
        (["--moe", "comet_ds:pat=fused"], "unknown key 'pat'"),
        (["--moe", "autoep:pat=fused"], "AutoEP has no options ['pat']"),
        (["--moe", "deepspeed:path=fused"], "deepspeed takes no options"),
        (["--shapes", "gelu-k1"], "experts are gated, those of gelu-k1 are not"),
        (["--shapes", "qwen4"], "unknown shapes ['qwen4']"),
        (["--zero", "1,3"], "the ZeRO stage must be 0, 1 or 2, got 3"),
        (["--heads", "7"], "hidden must be a multiple of heads, got 2048, 7"),
        (["--layers", "0"], "--layers: must be a whole number of at least 1, got '0'"),
        (["--rounds", "0"], "--rounds: must be a whole number of at least 1, got '0'"),
        (["--ranks", "3"], "a multiple of --ranks, got 128 experts (qwen3-30b) and 3 ranks"),
        (["--config", "nowhere.json"], "must be a file that exists, got 'nowhere.json'"),
    ],
)
def test_bad_arguments_are_refused(
    argv: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        parse_args(argv)
    assert message in capsys.readouterr().err


def test_arguments_make_workloads() -> None:
    argv = ["--shapes", "qwen3-30b,mixtral-8x7b", "--zero", "1,2", "--micro-batches", "1,4"]
    _, works, variants = parse_args(argv)
    found = [(w.shape, w.layers, w.zero, w.micro_batches) for w in works]
    sizes = [(1, 1), (1, 4), (2, 1), (2, 4)]
    expected = [("qwen3-30b", 8, *size) for size in sizes]
    assert found == expected + [("mixtral-8x7b", 2, *size) for size in sizes]
    assert [variant.label for variant in variants] == ["comet_ds", "autoep", "deepspeed"]


def test_example_must_be_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_models, "EXAMPLES", tmp_path)
    with pytest.raises(RuntimeError, match=r"train_gpt_moe\.py, which is not at .*checkout"):
        load_example()


def test_training_is_compared() -> None:
    theirs = {"losses": [5.0, 4.0, 3.0], "grad_norm": 2.0}
    ours = {"losses": [5.005, 4.08, 3.0], "grad_norm": 2.02}
    found = check_training(ours, theirs, "ours")
    assert found == "first loss 1.0e-03, gradients' norm 1.0e-02, 2 losses 2.0e-02"
    for wrong in (
        {"losses": [5.02, 4.0, 3.0]},
        {"losses": [5.0, 4.0, 3.1]},
        {"losses": [5.0, 4.0, 3.0], "grad_norm": 2.1},
        {"losses": [5.0, math.nan, 3.0]},
        {"losses": [5.0, 4.0, math.nan]},
    ):
        with pytest.raises(AssertionError, match="ours does not train as DeepSpeed's layer"):
            check_training(wrong, theirs, "ours")
    # What rounding does to DeepSpeed's own training is no fault of ours.
    further = {"losses": [5.0, 4.0, 3.15]}
    assert "(rounding alone 3.0e-02)" in check_training(further, theirs, "ours", noise=0.03)
    with pytest.raises(AssertionError):
        check_training(further, theirs, "ours", noise=0.02)


def check_runs(rank: int, size: int) -> dict[str, tuple[float, float, float]]:
    """Return every layer's first and second loss and first gradients' norm."""
    example, found = load_example(), {}
    work = replace(SMALL, no_drop=True, top_k=3)
    for label in ("comet_ds", "autoep", "deepspeed"):
        run = Run(example, work, Variant.parse(label), Plan.config, 2)
        run.train(1)
        norm = run.grad_norm()
        run.train(1)
        model = weakref.ref(run.engine.module)
        found[label] = (*run.mean_losses(), norm)
        run.free()
        gc.collect()
        assert model() is None, f"the model with {label} is still in memory"
    return found


def test_layers_begin_with_the_same_weights(world) -> None:
    """Without dropping and random second routes, all three compute the same, AutoEP too."""
    [found, other] = world(2).run(check_runs)
    assert found == other
    assert found["comet_ds"] == pytest.approx(found["deepspeed"], rel=2e-3)
    # AutoEP has no auxiliary loss, which is part of the gradients' norm and the second loss.
    assert found["autoep"][0] == pytest.approx(found["deepspeed"][0], rel=1e-3)
    assert found["autoep"][1:] == pytest.approx(found["deepspeed"][1:], rel=2e-2)


def check_wrong_layer(rank: int, size: int) -> None:
    example = load_example()
    build_moe = example.build_moe

    def build_wrong(args: object) -> torch.nn.Module:
        layer = build_moe(args)
        if args.moe == "comet_ds":
            layer.register_forward_hook(lambda module, inputs, output: (-output[0], *output[1:]))
        return layer

    example.build_moe = build_wrong
    variants = [Variant.parse("comet_ds")]
    with pytest.raises(AssertionError, match="comet_ds does not train as DeepSpeed's layer"):
        bench_train.check_small_model(example, SMALL, variants, Plan.config)


def test_wrong_layer_is_not_timed(world) -> None:
    world(2).run(check_wrong_layer)


def test_whole_model_is_benched(tmp_path: Path) -> None:
    """The command, on two ranks without GPUs: what it prints and writes is what it found."""
    result = tmp_path / "result.json"
    sizes = "--hidden 32 --ffn 48 --experts 4 --top-k 2 --layers 3 --heads 4 --seq-len 16 --batch 2"
    plan = "--micro-batches 2 --zero 1 --rounds 2 --blocks 2 --steps 2 --warmup 1 --phases"
    moe = "comet_ds,comet_ds:path=reference,autoep,deepspeed"
    command = [sys.executable, "-m", "comet_ds", "bench", "train", *sizes.split(), *plan.split()]
    command += ["--ranks", "2", "--moe", moe, "--json", str(result)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    [work] = json.loads(result.read_text())["workloads"]
    assert list(work["variants"]) == moe.split(",")
    for label, found in work["variants"].items():
        assert len(found["blocks_ms"]) == 4 and found["min_ms"] <= found["step_ms"]
        # 2 ranks x 2 micro-batches x 2 x 16 tokens a step
        assert found["tokens_per_s"] == pytest.approx(128e3 / found["step_ms"])
        assert found["tflops_per_gpu"] == pytest.approx(
            work["flop_per_step"] / found["step_ms"] / 1e9
        )
        first = work["variants"]["deepspeed"]["losses"][0]
        assert len(found["losses"]) == 5 and found["losses"][0] == pytest.approx(first, rel=1e-2)
        assert min(found["phases_ms"].values()) > 0
        assert f"{found['losses'][0]:.3f} -> {found['losses'][-1]:.3f}" in done.stdout, label
    assert set(work["checks"]) == {"comet_ds", "comet_ds:path=reference"}
    assert "3 layers, H 32, F 48, E 4, k 2" in done.stdout
    rates = {label: found["tokens_per_s"] for label, found in work["variants"].items()}
    others = ", ".join(
        f"{rates['comet_ds'] / rates[label]:.2f} x {label}" for label in moe.split(",")[1:]
    )
    expected = f"given, ZeRO 1, 2 micro-batches: tokens/s of comet_ds are {others}"
    assert expected in done.stdout


def test_medians_are_over_all_rounds(world) -> None:
    assert world(1).run(check_summary) == [(3.0, 1.0, 9.0, 2.5, 0.75)]


def check_summary(rank: int, size: int) -> tuple[float, ...]:
    rounds = [
        {"blocks_ms": [9.0, 1.0], "losses": [5.0], "peak_gib": 2.5, "outside_gib": 0.1},
        {"blocks_ms": [2.0, 4.0], "losses": [5.0], "peak_gib": 2.0, "outside_gib": 0.1},
    ]
    rounds[-1]["profile"] = {"busy_ms": 2.25}
    found = summarise(rounds, SMALL, 10)
    keys = ("step_ms", "min_ms", "max_ms", "peak_gib", "busy_share")
    return tuple(found[key] for key in keys)


def test_no_ratio_without_another_layer() -> None:
    record = {"shape": "s", "zero": 1, "micro_batches": 1}
    alone = {**record, "variants": {"comet_ds": {"tokens_per_s": 1.0}}}
    others = {**record, "variants": {"autoep": {"tokens_per_s": 1.0}}}
    assert list(ratios([alone, others])) == []
