# SPDX-License-Identifier: Apache-2.0
"""What users put in the place of gates, experts and DeepSpeed's functions runs, as in DeepSpeed.

Every replacement gives DeepSpeed's results on one rank and on two. A path that would not run it is
refused or gives way, and one line of the log says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed.moe.experts
import deepspeed.moe.layer
import pytest
import torch
from deepspeed.moe import sharded_moe
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from deepspeed.utils import logger
from helpers.overrides import NUM_EXPERTS, OBJECTS
from helpers.parity import FFN, HIDDEN, VARIANTS, build, run, tokens
from helpers.tolerance import assert_close
from torch import Tensor, nn

from comet_ds import MoE
from comet_ds.fused.refusal import Refusal


def check_alike(
    rank: int, size: int, change: Callable[[DeepSpeedMoE], None] | None, variants: list, **options
) -> None:
    x, grad = tokens(rank, (48, HIDDEN))
    common = dict(ep_size=size, num_experts=NUM_EXPERTS, **options)

    def made(cls: type[DeepSpeedMoE], **block: Any) -> DeepSpeedMoE:
        layer = build(cls, rank, **common, **block)
        if change is not None:
            change(layer)
        if size > 1:
            layer.set_deepspeed_parallelism()
        return layer

    expected = run(made(DeepSpeedMoE), x, grad)
    for variant in variants:
        got = run(made(MoE, comet_ds=VARIANTS.get(variant, {})), x, grad)
        assert set(got) == set(expected)
        for name, value in expected.items():
            assert_close(got[name], value, f"rank {rank}, {variant}: {name}")


def check_objects(rank: int, size: int, name: str, k: int, drop: bool) -> None:
    check_alike(rank, size, OBJECTS[name][0], list(VARIANTS), k=k, drop_tokens=drop)


@pytest.mark.parametrize("drop", [True, False], ids=["dropping", "dropless"])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("name", OBJECTS)
@pytest.mark.parametrize("size", [1, 2])
def test_objects_run_as_in_deepspeed(world, size: int, name: str, k: int, drop: bool) -> None:
    if size == 1:
        check_objects(0, 1, name, k, drop)
    else:
        world(size).run(check_objects, name, k, drop)


def patched_function(name: str, change: Callable[[Any], Any]) -> Any:
    original = getattr(sharded_moe, name)

    def function(*args: Any, **kwargs: Any) -> Any:
        return change(original(*args, **kwargs))

    return function


def doubled_loss(result: tuple) -> tuple:
    return 2 * result[0], *result[1:]


class DoublingAllToAll(torch.autograd.Function):
    """Sends as DeepSpeed does, and doubles."""

    @staticmethod
    def forward(ctx: Any, group: Any, input: Tensor) -> Tensor:
        ctx.group = group
        output = torch.empty_like(input)
        torch.distributed.all_to_all_single(output, input.contiguous(), group=group)
        return 2 * output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return None, DoublingAllToAll.apply(ctx.group, grad)


FUNCTIONS: dict[str, Callable[[], tuple[Any, str, Any]]] = {
    **{
        f"{name}gating": lambda name=name: (
            sharded_moe,
            f"{name}gating",
            patched_function(f"{name}gating", doubled_loss),
        )
        for name in ("top1", "top2", "topk")
    },
    "_capacity": lambda: (
        sharded_moe,
        "_capacity",
        patched_function("_capacity", lambda c: c // 2),
    ),
    "gumbel_rsample": lambda: (
        sharded_moe,
        "gumbel_rsample",
        patched_function("gumbel_rsample", torch.zeros_like),
    ),
    "multiplicative_jitter": lambda: (
        sharded_moe,
        "multiplicative_jitter",
        patched_function("multiplicative_jitter", torch.sin),
    ),
    "TopKGate.forward": lambda: (sharded_moe.TopKGate, "forward", sharper_forward),
    "Experts.forward": lambda: (
        deepspeed.moe.experts.Experts,
        "forward",
        lambda self, inputs, original=deepspeed.moe.experts.Experts.forward: (
            -original(self, inputs)
        ),
    ),
    "_sparse_decode": lambda: (
        sharded_moe,
        "_sparse_decode",
        patched_function("_sparse_decode", torch.tanh),
    ),
    "_AllToAll": lambda: (sharded_moe, "_AllToAll", DoublingAllToAll),
    "MOELayer.forward": lambda: (
        sharded_moe.MOELayer,
        "forward",
        lambda self, *args, original=sharded_moe.MOELayer.forward: original(self, *args).sin(),
    ),
}


def sharper_forward(
    self: nn.Module, input: Tensor, *args: Any, original: Any = sharded_moe.TopKGate.forward
) -> tuple:
    return original(self, 3 * input, *args)


OF_LAYER = ("_sparse_decode", "_AllToAll", "MOELayer.forward")


@contextlib.contextmanager
def patched(name: str) -> Iterator[None]:
    owner, attribute, value = FUNCTIONS[name]()
    before = owner.__dict__[attribute]
    setattr(owner, attribute, value)
    try:
        yield
    finally:
        setattr(owner, attribute, before)


def check_functions(rank: int, size: int, name: str, k: int) -> None:
    variants = ["auto"] if name in OF_LAYER else list(VARIANTS)
    with patched(name):
        noise = "RSample" if k == 1 and name == "gumbel_rsample" else "Jitter"
        check_alike(rank, size, None, variants, k=k, noisy_gate_policy=noise)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("size", [1, 2])
def test_patched_functions_run(world, size: int, name: str, k: int) -> None:
    if size == 1:
        check_functions(0, 1, name, k)
    else:
        world(size).run(check_functions, name, k)


@pytest.mark.parametrize("name", OF_LAYER)
@pytest.mark.parametrize("path", ["reference", "pipelined"])
def test_pinned_path_without_what_is_patched_is_refused(name: str, path: str) -> None:
    layer = build(MoE, 0, comet_ds={"path": path})
    with (
        patched(name),
        pytest.raises(RuntimeError, match=f'"{path}" is pinned .*{name} is patched'),
    ):
        layer(torch.randn(8, HIDDEN))
    assert layer(torch.randn(8, HIDDEN))[0].isfinite().all()


@pytest.mark.parametrize("name", OBJECTS)
def test_pinned_fused_names_the_object(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = build(MoE, 0, comet_ds={"path": "fused"})
    monkeypatch.setattr(layer.deepspeed_moe.choice, "connect", lambda *_: None)  # as with a GPU
    refusal = Refusal("it has hooks")
    monkeypatch.setattr(layer.deepspeed_moe.fused, "recognise", lambda experts, x: refusal)
    OBJECTS[name][0](layer)
    expected = OBJECTS[name][1] or "it has hooks"
    with pytest.raises(RuntimeError, match=f'"fused" is pinned and cannot run: {expected}'):
        layer(torch.randn(8, HIDDEN))


@pytest.mark.parametrize("name", [n for n in OBJECTS if OBJECTS[n][1]])
def test_one_line_says_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said = []
    monkeypatch.setattr(logger, "log_dist_once", lambda message, **_: said.append(message))
    layer = build(MoE, 0, k=2)
    layer(torch.randn(8, HIDDEN))
    OBJECTS[name][0](layer)
    layer(torch.randn(8, HIDDEN))
    layer(torch.randn(8, HIDDEN))
    lines = [line for line in said if "MoE path" in line]
    assert len(lines) == 2 and OBJECTS[name][1] not in lines[0]
    assert f"; {OBJECTS[name][1]}, called as DeepSpeed does" in lines[1]


def test_patched_class_of_an_expert_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """After its experts have been recognised."""
    from helpers.experts_zoo import HandWrittenMLP

    from comet_ds.experts.mlp import RecognisedExperts

    experts, recognised = [HandWrittenMLP(HIDDEN, FFN)], RecognisedExperts()
    assert recognised.find(experts)[0].activation == "relu"
    monkeypatch.setattr(
        HandWrittenMLP, "forward", lambda self, x: self.dense_4h_to_h(self.dense_h_to_4h(x).tanh())
    )
    assert isinstance(recognised.find(experts), str)


@pytest.mark.gpu(1)
@pytest.mark.parametrize("name", OBJECTS)
def test_fused_path_gives_way(name: str) -> None:
    """And takes over again from a gate whose hook is gone."""
    layer = build(MoE, 0, k=2, dtype=torch.bfloat16, device="cuda", drop_tokens=False)
    x = torch.randn(64, HIDDEN, device="cuda", dtype=torch.bfloat16)
    handle = layer.deepspeed_moe.gate.register_forward_hook(lambda *_: None)
    layer(x)
    assert layer.deepspeed_moe.path == "pipelined"
    handle.remove()
    layer(x)
    assert layer.deepspeed_moe.path == "fused"
    OBJECTS[name][0](layer)
    layer.to("cuda", torch.bfloat16)
    if name != "replaced gate":  # it routes on the CPU
        layer(x)
        assert layer.deepspeed_moe.path == "pipelined"
