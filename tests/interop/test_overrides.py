# SPDX-License-Identifier: Apache-2.0
"""What users put in the place of gates, experts and DeepSpeed's functions runs, as in DeepSpeed."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed.moe.experts
import deepspeed.moe.layer
import pytest
import torch
from deepspeed.moe import sharded_moe
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from deepspeed.utils import logger
from parity import FFN, HIDDEN, VARIANTS, build, run, tokens
from tolerance import assert_close
from torch import Tensor, nn

from comet_ds import MoE
from comet_ds.fused.refusal import Refusal
from comet_ds.gate.topk_gate import TopKGate

NUM_EXPERTS = 8

# ---- what users put in ---------------------------------------------------------------------------


class HashGate(nn.Module):
    """Routes by position; has nothing of DeepSpeed's gate, not even its attributes."""

    def __init__(self, num_experts: int = NUM_EXPERTS) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, num_experts))

    def _set_ep_group(self, ep_group: Any) -> None:
        """What DeepSpeed's layer calls."""

    def forward(self, x: Tensor, used_token: Any, sparse_routes: bool, use_tutel: bool) -> tuple:
        assert (sparse_routes, use_tutel) == (True, False)
        num_tokens, num_experts = x.shape[0], self.scale.numel()
        token = torch.arange(num_tokens)
        ids = torch.stack([token % num_experts, (token + 3) % num_experts, (token + 5) % 7])
        ids[1, ::4] = -1
        slots = nn.functional.one_hot(ids.clamp(min=0), num_experts).flatten(0, 1).cumsum(0) - 1
        slots = slots.view(*ids.shape, -1).gather(2, ids.clamp(min=0).unsqueeze(2)).squeeze(2)
        weights = self.scale[ids.clamp(min=0)] * torch.sigmoid(x.float().mean(1))
        counts = torch.bincount(ids[ids >= 0], minlength=num_experts)
        l_aux = self.scale.square().sum()
        capacity = torch.tensor(3 * num_tokens)
        return l_aux, capacity, num_experts, ids.int(), slots.int(), weights, counts


class SharperGate(sharded_moe.TopKGate):
    """A subclass that changes what it is given."""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> tuple:
        return super().forward(3 * input, *args, **kwargs)


class OurSharperGate(TopKGate):
    forward = SharperGate.__dict__["forward"]


OurSharperGate.forward = types.FunctionType(
    SharperGate.forward.__code__,
    SharperGate.forward.__globals__,
    closure=tuple(types.CellType(OurSharperGate) for _ in SharperGate.forward.__closure__),
)


class Centering(deepspeed.moe.experts.Experts):
    """Looks at all experts' rows together, which no single expert can."""

    def forward(self, inputs: Tensor) -> Tensor:
        assert inputs.dim() == 4 and inputs.shape[1] == self.num_local_experts
        norms = inputs.square().sum((0, 2, 3), keepdim=True).sqrt()
        return super().forward(inputs) * (1 + norms / norms.sum())


class Wrapped(nn.Module):
    """Has the layer's experts inside."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.inner = experts
        self.gain = nn.Parameter(torch.full((HIDDEN,), 1.5))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.gain * self.inner(inputs)


def gate_arguments(layer: DeepSpeedMoE) -> tuple:
    gate = layer.deepspeed_moe.gate
    capacity = (gate.capacity_factor, gate.eval_capacity_factor, gate.min_capacity)
    return (HIDDEN, NUM_EXPERTS, gate.k, *capacity, gate.noisy_gate_policy, gate.drop_tokens)


def replace_gate(layer: DeepSpeedMoE) -> None:
    layer.deepspeed_moe.gate = HashGate()


def subclass_gate(layer: DeepSpeedMoE) -> None:
    cls = OurSharperGate if isinstance(layer, MoE) else SharperGate
    gate = cls(*gate_arguments(layer))
    gate.load_state_dict(layer.deepspeed_moe.gate.state_dict())
    layer.deepspeed_moe.gate = gate


def stock_gate(layer: DeepSpeedMoE) -> None:
    gate = sharded_moe.TopKGate(*gate_arguments(layer))
    gate.load_state_dict(layer.deepspeed_moe.gate.state_dict())
    layer.deepspeed_moe.gate = gate


def patch_gate(layer: DeepSpeedMoE) -> None:
    gate = layer.deepspeed_moe.gate

    def forward(self: nn.Module, input: Tensor, *args: Any) -> tuple:
        l_aux, *rest = type(self).forward(self, input, *args)
        return 2 * l_aux, *rest

    gate.forward = types.MethodType(forward, gate)


def change_by_hook(layer: DeepSpeedMoE) -> None:
    """Hooks may change what a module is given and what it returns."""
    moe = layer.deepspeed_moe
    moe.gate.register_forward_pre_hook(lambda _, args: (2 * args[0], *args[1:]))
    moe.gate.register_forward_hook(lambda _, args, out: (out[0] * 3, *out[1:5], out[5] / 2, out[6]))
    moe.experts.register_forward_hook(lambda _, args, out: out + args[0])
    moe.experts.deepspeed_experts[1].register_forward_hook(lambda _, args, out: 2 * out)


def subclass_experts(layer: DeepSpeedMoE) -> None:
    old = layer.deepspeed_moe.experts
    new = Centering(old.deepspeed_experts[0], layer.num_local_experts, layer.expert_group_name)
    new.deepspeed_experts.load_state_dict(old.deepspeed_experts.state_dict())
    layer.deepspeed_moe.experts = new


def wrap_experts(layer: DeepSpeedMoE) -> None:
    layer.deepspeed_moe.experts = Wrapped(layer.deepspeed_moe.experts)


def patch_experts(layer: DeepSpeedMoE) -> None:
    experts = layer.deepspeed_moe.experts
    experts.forward = types.MethodType(
        lambda self, inputs: type(self).forward(self, inputs.flip(1)).flip(1), experts
    )


def patch_one_expert(layer: DeepSpeedMoE) -> None:
    expert = layer.deepspeed_moe.experts.deepspeed_experts[0]
    expert.forward = types.MethodType(lambda self, x: -type(self).forward(self, x), expert)


OBJECTS: dict[str, tuple[Callable[[DeepSpeedMoE], None], str]] = {
    "replaced gate": (replace_gate, "the gate is a test_overrides.HashGate"),
    "subclass of the gate": (subclass_gate, "the gate is a test_overrides.OurSharperGate"),
    "DeepSpeed's gate": (stock_gate, "the gate is a deepspeed.moe.sharded_moe.TopKGate"),
    "patched gate": (patch_gate, "the forward of the gate, a TopKGate, is patched"),
    "hooks": (change_by_hook, "the gate has hooks"),
    "subclass of Experts": (subclass_experts, "Experts is a test_overrides.Centering"),
    "wrapped Experts": (wrap_experts, "Experts is a test_overrides.Wrapped"),
    "patched Experts": (patch_experts, "the forward of the experts' StackedExperts is patched"),
    "patched expert": (patch_one_expert, ""),
}


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


# ---- as DeepSpeed's layer --------------------------------------------------------------------


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


# ---- hooks ---------------------------------------------------------------------------------------


HOOKED = {
    "gate": lambda moe: moe.gate,
    "experts": lambda moe: moe.experts,
    "expert": lambda moe: moe.experts.deepspeed_experts[0],
    "layer": lambda moe: moe,
}


def check_hooks(rank: int, size: int, variant: str, drop: bool, where: range) -> dict[str, int]:
    """Only some ranks have hooks; the others' results stay what they were."""
    layer = build(
        MoE,
        rank,
        ep_size=size,
        k=2,
        drop_tokens=drop,
        parallel=size > 1,
        comet_ds=VARIANTS[variant],
    )
    x, grad = tokens(rank, (3, HIDDEN))  # fewer than min_capacity, which DeepSpeed's k = 1 refuses
    expected, calls = run(layer, x, grad), dict.fromkeys(HOOKED, 0)
    inputs = {}
    if rank in where:
        for name, find in HOOKED.items():
            module = find(layer.deepspeed_moe)

            def count(module, args, *_, name=name):
                calls[name] += 1
                inputs[name] = args[0]

            module.register_forward_pre_hook(count)
            module.register_forward_hook(count)
            module.register_full_backward_hook(lambda *_, name=name: count(_[0], [None], name=name))
    got = run(layer, x, grad)
    for name, value in expected.items():
        assert_close(got[name], value, f"rank {rank}, {variant}: {name}")
    return calls


@pytest.mark.parametrize("drop", [True, False], ids=["dropping", "dropless"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [1, 2])
def test_hooks_fire_where_they_are(world, size: int, variant: str, drop: bool) -> None:
    if size == 1:
        results = [check_hooks(0, 1, variant, drop, range(1))]
    else:
        results = world(size).run(check_hooks, variant, drop, range(1))
    assert set(results[0].values()) == {3}, results
    assert all(set(r.values()) == {0} for r in results[1:])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_hook_on_the_gate_changes_nothing(k: int, variant: str) -> None:
    """Not even for fewer tokens than DeepSpeed's gate takes, or none."""
    layer = build(MoE, 0, k=k, comet_ds=VARIANTS[variant])
    for num_tokens in (0, 1, 33):
        x, grad = tokens(0, (num_tokens, HIDDEN))
        expected = run(layer, x, grad)
        handle = layer.deepspeed_moe.gate.register_forward_hook(lambda *_: None)
        got = run(layer, x, grad)
        handle.remove()
        for name, value in expected.items():
            assert torch.equal(got[name], value), name


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("drop", [True, False], ids=["dropping", "dropless"])
def test_a_hook_sees_what_deepspeeds_gate_returns(k: int, drop: bool) -> None:
    seen = []
    x = torch.randn(40, HIDDEN)
    for cls in (DeepSpeedMoE, MoE):
        layer = build(cls, 0, k=k, drop_tokens=drop, capacity_factor=0.6)
        layer.deepspeed_moe.gate.register_forward_hook(lambda _, args, out: seen.append(out))
        torch.manual_seed(2)
        layer(x)
    theirs, ours = seen
    for index, name in enumerate(("l_aux", "capacity", "experts", "indices", "slots", "gates")):
        kept = theirs[3] >= 0
        expected, got = (torch.as_tensor(answer[index]) for answer in seen)
        if name == "slots":
            expected, got = expected[kept], got[kept]
        assert expected.dtype == got.dtype and torch.equal(expected, got), name
    assert torch.equal(theirs[6], ours[6])


def test_hooks_on_all_modules_fire() -> None:
    called = []
    layer = build(MoE, 0, k=2)
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: called.append(module)
    )
    try:
        layer(torch.randn(16, HIDDEN))
    finally:
        handle.remove()
    moe = layer.deepspeed_moe
    for module in (layer, moe, moe.gate, moe.experts, *moe.experts.deepspeed_experts.modules()):
        if not isinstance(module, nn.ModuleList):
            assert any(module is m for m in called), module


# ---- construction and errors ---------------------------------------------------------------------


def test_classes_put_into_deepspeeds_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the layer is built; DeepSpeed's class then builds them too."""
    monkeypatch.setattr(deepspeed.moe.layer, "TopKGate", SharperGate)
    monkeypatch.setattr(deepspeed.moe.layer, "Experts", Centering)
    layers = [build(cls, 0, k=2) for cls in (DeepSpeedMoE, MoE)]
    x, grad = tokens(0, (48, HIDDEN))
    expected, got = (run(layer, x, grad) for layer in layers)
    assert type(layers[1].deepspeed_moe.gate) is SharperGate
    assert type(layers[1].deepspeed_moe.experts) is Centering
    for name, value in expected.items():
        assert_close(got[name], value, name)


def test_another_moelayer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Layer(sharded_moe.MOELayer):
        pass

    monkeypatch.setattr(deepspeed.moe.layer, "MOELayer", Layer)
    with pytest.raises(ValueError, match=r"MOELayer must be DeepSpeed's, got .*Layer"):
        build(MoE, 0)


def check_replaced_moelayer(rank: int, size: int) -> None:
    """Put in afterwards, it runs: DeepSpeed's, with our gate and experts."""
    x, grad = tokens(rank, (48, HIDDEN))
    expected = run(build(DeepSpeedMoE, rank, ep_size=size, k=2, parallel=True), x, grad)
    layer = build(MoE, rank, ep_size=size, k=2)
    own = layer.deepspeed_moe
    sizes = (layer.expert_group_name, size, layer.num_local_experts)
    layer.deepspeed_moe = sharded_moe.MOELayer(own.gate, own.experts, *sizes)
    layer.set_deepspeed_parallelism()
    got = run(layer, x, grad)
    for name, value in expected.items():
        assert_close(got[name], value, name)


def test_replaced_moelayer_runs(world) -> None:
    world(2).run(check_replaced_moelayer)


WRONG = {
    "4 values": (lambda out: out[:4], "DeepSpeed's 7 values .* got 4 values"),
    "no tuple": (lambda out: out[5], "DeepSpeed's 7 values .* got a Tensor"),
    "token-major": (lambda out: (*out[:3], out[3].t(), *out[4:]), r"\[routes, 24\], got \[24, 3\]"),
    "other experts": (lambda out: (*out[:2], 4, *out[3:]), "layer's 8 experts, got 4"),
    "bad index": (lambda out: (*out[:3], out[3] + 2, *out[4:]), "indices below 8, got 9"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_answers_of_a_gate(name: str) -> None:
    change, message = WRONG[name]
    layer = build(MoE, 0)
    replace_gate(layer)
    layer.deepspeed_moe.gate.register_forward_hook(lambda _, args, out: change(out))
    with pytest.raises(ValueError, match=f"the gate, a HashGate, must .*{message}"):
        layer(torch.randn(24, HIDDEN))


@pytest.mark.parametrize("variant", VARIANTS)
def test_wrong_answer_of_experts(variant: str) -> None:
    layer = build(MoE, 0, comet_ds=VARIANTS[variant])
    layer.deepspeed_moe.experts.register_forward_hook(lambda _, args, out: out[..., :3])
    with pytest.raises(ValueError, match=r"Experts must return the shape .* from StackedExperts"):
        layer(torch.randn(24, HIDDEN))


def test_a_gate_without_a_tensor_loss() -> None:
    layer = build(MoE, 0)
    replace_gate(layer)
    layer.deepspeed_moe.gate.register_forward_hook(lambda _, args, out: (0.0, *out[1:]))
    output, l_aux, counts = layer(torch.randn(24, HIDDEN))
    assert l_aux == 0.0 and counts.sum() == 66 and output.isfinite().all()


def check_disagreement(rank: int, size: int) -> str:
    layer = build(MoE, rank, ep_size=size)
    if rank == 1:
        replace_gate(layer)
    with pytest.raises(ValueError) as error:
        layer.set_deepspeed_parallelism()
    return str(error.value)


def test_a_gate_on_one_rank_only_is_refused(world) -> None:
    for message in world(2).run(check_disagreement):
        assert "HashGate on rank 1" in message


def test_patched_class_of_an_expert_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """After its experts have been recognised."""
    from experts_zoo import HandWrittenMLP

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
    assert layer.deepspeed_moe.path == "fused", layer.deepspeed_moe._reason
    OBJECTS[name][0](layer)
    layer.to("cuda", torch.bfloat16)
    if name != "replaced gate":  # it routes on the CPU
        layer(x)
        assert layer.deepspeed_moe.path == "pipelined"
