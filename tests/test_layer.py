# SPDX-License-Identifier: Apache-2.0
"""The layer on one rank: DeepSpeed's contract, parity with its layer, errors."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle

import deepspeed.moe.layer
import pytest
import torch
from deepspeed.moe import sharded_moe
from deepspeed.moe.experts import Experts
from deepspeed.moe.utils import has_moe_layers, is_moe_param
from deepspeed.utils import logger
from helpers.experts_zoo import GatedMLP, HandWrittenMLP, NormMLP, TupleMLP, sequential
from helpers.parity import FFN, HIDDEN, build, run
from helpers.tolerance import assert_close
from torch import nn

from comet_ds import MoE

DeepSpeedMoE = deepspeed.moe.layer.MoE
PATHS = ["reference", "pipelined"]
ATTRIBUTES = {
    "": "use_residual enable_expert_tensor_parallelism ep_size expert_group_name num_experts "
    "num_local_experts deepspeed_moe",
    "deepspeed_moe": "gate experts ep_group ep_size ep_group_name num_local_experts "
    "time_falltoall time_salltoall time_moe timers wall_clock_breakdown use_tutel",
    "deepspeed_moe.gate": "wg ep_group k capacity_factor eval_capacity_factor min_capacity "
    "noisy_gate_policy timers wall_clock_breakdown gate_time drop_tokens use_rts "
    "top2_2nd_expert_sampling",
}


def compare(options: dict, x: torch.Tensor, used=None, training=True, path="pipelined") -> None:
    grad = torch.randn(x.shape).to(x.dtype)
    results = []
    for cls in (DeepSpeedMoE, MoE):
        extra = {"comet_ds": {"path": path}} if cls is MoE else {}
        layer = build(cls, 0, dtype=x.dtype, **options, **extra).train(training)
        results.append(run(layer, x, grad, used))
    for name, expected in results[0].items():
        assert_close(results[1][name], expected, f"{options}: {name}")


def test_is_deepspeeds_layer() -> None:
    layer = build(MoE, 0, use_residual=True)
    assert isinstance(layer, DeepSpeedMoE) and has_moe_layers(layer) == (True, 8)
    assert isinstance(layer.deepspeed_moe, sharded_moe.MOELayer)
    assert isinstance(layer.deepspeed_moe.gate, sharded_moe.TopKGate)
    assert isinstance(layer.deepspeed_moe.experts, Experts)
    stock = inspect.signature(DeepSpeedMoE.__init__).parameters
    ours = inspect.signature(MoE.__init__).parameters
    for mine, theirs in itertools.zip_longest(list(ours.values())[: len(stock)], stock.values()):
        assert (mine.name, mine.default, mine.kind) == (theirs.name, theirs.default, theirs.kind)
    assert ours["comet_ds"].kind is inspect.Parameter.KEYWORD_ONLY


def test_attribute_tree() -> None:
    ours, theirs = build(MoE, 0, use_residual=True), build(DeepSpeedMoE, 0, use_residual=True)
    for path, names in ATTRIBUTES.items():
        for name in names.split():
            mine, stock = ours.get_submodule(path), theirs.get_submodule(path)
            assert type(getattr(mine, name)).__name__ == type(getattr(stock, name)).__name__ or (
                name in ("deepspeed_moe", "gate", "experts")
            )
    assert ours.mlp is not None and ours.coefficient.out_features == 2


@pytest.mark.parametrize("residual", [False, True])
def test_same_weights_names_and_tags(residual: bool) -> None:
    layers = []
    for cls in (DeepSpeedMoE, MoE):
        torch.manual_seed(0)
        layers.append(cls(HIDDEN, sequential(HIDDEN, FFN), 4, k=2, use_residual=residual))
    theirs, ours = (layer.state_dict() for layer in layers)
    assert list(theirs) == list(ours)
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    for name, param in layers[1].named_parameters():
        assert is_moe_param(param) == ("deepspeed_experts" in name), name
        if is_moe_param(param):
            assert param.group_name == "ep_size_1"
    assert not [n for n in ours if "expert" in n and "deepspeed_experts." not in n]


def test_construction_leaves_the_generator_where_deepspeed_leaves_it() -> None:
    draws = []
    for cls in (DeepSpeedMoE, MoE):
        torch.manual_seed(0)
        cls(HIDDEN, sequential(HIDDEN, FFN), 4, use_residual=True)
        draws.append(torch.rand(3))
    assert torch.equal(*draws)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["copy.deepcopy", "pickle"],
)
def test_copies_keep_their_tags(copied) -> None:
    layer = copied(build(MoE, 0))
    experts = [p for p in layer.parameters() if is_moe_param(p)]
    assert sum(p.numel() for p in experts) == 8 * (2 * HIDDEN * FFN + HIDDEN + FFN)
    x = torch.randn(9, HIDDEN)
    assert_close(layer.eval()(x)[0], build(MoE, 0).eval()(x)[0], "output of the copy")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("k", [1, 2, 4, 8])
@pytest.mark.parametrize("drop", [True, False], ids=["dropping", "dropless"])
def test_parity_on_one_rank(path: str, k: int, drop: bool) -> None:
    """The gate's options are covered in test_gate; here what follows it."""
    torch.manual_seed(1)
    for shape, factor in (((3, 21, HIDDEN), 1.0), ((129, HIDDEN), 0.4), ((1, 8, HIDDEN), 1.0)):
        options = {"k": k, "drop_tokens": drop, "capacity_factor": factor}
        for training in (True, False):
            compare(options, torch.randn(shape), training=training, path=path)


OPTIONS: dict[str, dict] = {
    "residual": {"use_residual": True, "k": 2},
    "jitter": {"noisy_gate_policy": "Jitter", "k": 2},
    "noise on logits": {"noisy_gate_policy": "RSample"},
    "tokens kept in order": {"use_rts": False},
    "one expert": {"num_experts": 1},
    "gated, experts no power of two": {"num_experts": 6, "k": 3, "expert": GatedMLP(HIDDEN, FFN)},
    "expert returns a tuple": {"k": 2, "expert": TupleMLP(HIDDEN, FFN)},
    "expert that is no MLP": {"k": 2, "expert": NormMLP(HIDDEN, FFN)},
    "residual of an expert of one's own": {
        "k": 2,
        "use_residual": True,
        "expert": HandWrittenMLP(HIDDEN, FFN),
    },
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", OPTIONS)
def test_parity_of_options(path: str, name: str) -> None:
    torch.manual_seed(1)
    compare(OPTIONS[name], torch.randn(4, 16, HIDDEN), path=path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_parity_in_half_precision(dtype: torch.dtype, k: int) -> None:
    torch.manual_seed(1)
    compare({"k": k}, torch.randn(64, HIDDEN).to(dtype))


def test_parity_with_used_token() -> None:
    torch.manual_seed(1)
    compare({"k": 1}, torch.randn(64, HIDDEN), used=(torch.rand(64) < 0.6).long())


def test_autocast_gives_deepspeeds_dtype() -> None:
    x = torch.randn(32, HIDDEN)
    outputs = []
    for cls in (DeepSpeedMoE, MoE):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(build(cls, 0, k=2)(x)[0])
    assert_close(outputs[1], outputs[0], "output under autocast")


@pytest.mark.parametrize("path", PATHS)
def test_all_tokens_to_one_expert(path: str) -> None:
    layer = build(MoE, 0, drop_tokens=False, comet_ds={"path": path})
    with torch.no_grad():
        layer.deepspeed_moe.gate.wg.weight.zero_()[5] = 100.0
    x = torch.rand(33, HIDDEN)
    result = run(layer, x, torch.ones_like(x))
    assert result["exp_counts"].tolist() == [0, 0, 0, 0, 0, 33, 0, 0]
    expert = layer.deepspeed_moe.experts.deepspeed_experts[5]
    assert_close(result["output"], expert(x).detach(), "output")
    for name, grad in result.items():
        if "deepspeed_experts." in name:
            assert (grad.abs().sum() > 0) == (".5." in name), name


@pytest.mark.parametrize("path", PATHS)
def test_no_tokens(path: str) -> None:
    layer = build(MoE, 0, k=2, comet_ds={"path": path})
    result = run(layer, torch.empty(2, 0, HIDDEN), torch.empty(2, 0, HIDDEN))
    assert result["output"].shape == (2, 0, HIDDEN)
    assert all(t.abs().sum() == 0 for n, t in result.items() if n.startswith("grad"))


def test_repeats_bitwise() -> None:
    layer = build(MoE, 0, k=4, dtype=torch.bfloat16)
    x = torch.randn(65, HIDDEN).bfloat16()
    first, second = run(layer, x, x), run(layer, x, x)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_changed_experts_are_noticed() -> None:
    """LoRA and the like replace modules after construction."""
    layer = build(MoE, 0, k=2).eval()
    x = torch.randn(32, HIDDEN)
    layer(x)
    for expert in layer.deepspeed_moe.experts.deepspeed_experts:
        expert[3] = nn.Linear(FFN, HIDDEN)
    before = layer(x)[0]
    with torch.no_grad():
        for expert in layer.deepspeed_moe.experts.deepspeed_experts:
            expert[3].weight.zero_(), expert[3].bias.zero_()
    assert before.abs().sum() > 0 and layer(x)[0].abs().sum() == 0


def test_hooks_on_experts_run() -> None:
    layer, calls = build(MoE, 0), []
    for expert in layer.deepspeed_moe.experts.deepspeed_experts:
        expert.register_forward_hook(lambda *_: calls.append(1))
    layer(torch.randn(64, HIDDEN))
    assert len(calls) == 8


def test_wall_clock_breakdown_is_per_step() -> None:
    """DeepSpeed's own layer reports sums since the start."""
    layer = build(MoE, 0)
    moe = layer.deepspeed_moe
    moe.wall_clock_breakdown = moe.gate.wall_clock_breakdown = True
    times = []
    for _ in range(6):
        layer(torch.randn(256, HIDDEN))
        times.append(moe.time_moe)
        assert 0 < moe.gate.gate_time < moe.time_moe
    assert times[-1] < sum(times[:-1])
    # A failed forward leaves the timers usable.
    expert = moe.experts.deepspeed_experts[0]
    hook = expert.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        layer(torch.randn(8, HIDDEN))
    hook.remove()
    layer(torch.randn(8, HIDDEN))


BAD_CONSTRUCTION: dict[str, tuple[dict, type[Exception], str]] = {
    "experts no multiple of ranks": (
        dict(num_experts=7, ep_size=2),
        AssertionError,
        r"\(7\) should be divisible .* \(2\)",
    ),
    "unknown noise": (
        dict(noisy_gate_policy="Noise"),
        AssertionError,
        "Unsupported noisy_gate_policy: Noise",
    ),
    "more routes than experts": (
        dict(k=9),
        ValueError,
        r"k must be between 1 and num_experts \(8\), got 9",
    ),
    "no routes": (dict(k=0), ValueError, "got 0"),
    "unknown path": (dict(comet_ds={"path": "fast"}), ValueError, "path.*'fast'"),
}


@pytest.mark.parametrize("name", BAD_CONSTRUCTION)
def test_bad_construction(name: str) -> None:
    options, error, message = BAD_CONSTRUCTION[name]
    with pytest.raises(error, match=message):
        build(MoE, 0, **options)


BAD_INPUT: dict[str, tuple[torch.Tensor, str]] = {
    "hidden size": (torch.randn(4, HIDDEN + 1), "must end in hidden size 16, got 17"),
    "no dimensions": (torch.tensor(1.0), "must end in hidden size 16, got 0"),
    "dtype": (torch.randn(4, HIDDEN).bfloat16(), "dtype torch.float32, got torch.bfloat16"),
    "integers": (
        torch.ones(4, HIDDEN, dtype=torch.int64),
        "dtype torch.float32, got another dtype",
    ),
    "device": (torch.empty(4, HIDDEN, device="meta"), "must be on the layer's device cpu"),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(name: str, path: str) -> None:
    x, message = BAD_INPUT[name]
    with pytest.raises(ValueError, match=message):
        build(MoE, 0, comet_ds={"path": path})(x)


def test_used_token_of_wrong_length() -> None:
    with pytest.raises(ValueError, match=r"one entry per token, .* got 63 entries"):
        build(MoE, 0)(torch.randn(8, 8, HIDDEN), torch.ones(63))


def test_torch_compile() -> None:
    """The layer is a graph break, not an error."""
    layer = build(MoE, 0, k=2).eval()
    compiled = torch.compile(nn.Sequential(nn.Identity(), layer), backend="eager")
    x, outputs = torch.randn(9, HIDDEN), []
    for module in (layer, compiled):
        torch.manual_seed(0)
        outputs.append(module(x)[0])
    assert torch.equal(*outputs)


def test_expert_of_wrong_shape() -> None:
    layer = build(MoE, 0, expert=nn.Linear(HIDDEN, HIDDEN + 8))
    with pytest.raises(ValueError, match="must return the shape it was given"):
        layer(torch.randn(4, HIDDEN))


def test_parallel_without_groups() -> None:
    with pytest.raises(RuntimeError, match=r"ep_size is 2: call set_deepspeed_parallelism\(\)"):
        build(MoE, 0, ep_size=2)(torch.randn(4, HIDDEN))


def test_says_which_path_once(monkeypatch) -> None:
    said = []
    monkeypatch.setattr(logger, "log", lambda _, message: said.append(message))
    layer = build(MoE, 0, num_experts=3)
    layer.deepspeed_moe.runner.grouped_gemm = False  # a message no other test has caused
    layer(torch.randn(4, HIDDEN))
    layer(torch.randn(4, HIDDEN))
    build(MoE, 0, num_experts=3, comet_ds={"grouped_gemm": False})(torch.randn(4, HIDDEN))
    (line,) = (line for line in said if "MoE path" in line)
    assert "MoE path pipelined (not fused: it needs a CUDA device, not cpu)" in line
    for part in ("experts one by one", "grouped GEMM is off", "PyTorch row operations"):
        assert part in line
