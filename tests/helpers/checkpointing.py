# SPDX-License-Identifier: Apache-2.0
"""Engines of either layer that save and load checkpoints, and what their files must have."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn
from torch import distributed as dist

from comet_ds.experts import stackable
from helpers.experts_zoo import TiedMLP, sequential
from helpers.training import CLASSES, HIDDEN, Model, config, train

HAS_ALIGNMENT = hasattr(deepspeed.runtime.zero.config.DeepSpeedZeroConfig(), "parameter_alignment")
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 8}}
FUSED_ADAM = {"optimizer": {"type": "Adam", "params": {"lr": 1e-2}}}
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
MUON = {"optimizer": {"type": "Muon", "params": {"lr": 1e-2, "momentum": 0.9, "torch_adam": True}}}
SGD = {
    "optimizer": {"type": "SGD", "params": {"lr": 1e-2, "momentum": 0.9}},
    "zero_allow_untested_optimizer": True,
}


def uneven(layer: int, less: int = 0) -> nn.Module:
    """Return the expert of a layer; the first is larger, so that partitions end within layers."""
    return sequential(HIDDEN, (56, 32)[layer] - less)


EP1, EP2, EP4 = ({"ep_size": size, "k": 2, "expert": uneven} for size in (1, 2, 4))
STEPS = 3


# ---- engines -----------------------------------------------------------------------------------


@contextlib.contextmanager
def machine(limit: int | None, dtype: torch.dtype) -> Iterator[None]:
    """Let DeepSpeed split groups at a small size, and its CPU backend train in fp16."""
    accelerator, defaults, own = get_accelerator(), split.__defaults__, stackable.MAX_GROUP_NUMEL
    if limit is not None:
        split.__defaults__, stackable.MAX_GROUP_NUMEL = (limit,), limit
    if dtype == torch.float16:
        accelerator.is_fp16_supported = lambda: True
        accelerator.supported_dtypes = lambda: [torch.float, torch.half, torch.bfloat16]
    try:
        yield
    finally:
        split.__defaults__, stackable.MAX_GROUP_NUMEL = defaults, own
        for name in ("is_fp16_supported", "supported_dtypes"):
            accelerator.__dict__.pop(name, None)


def freeze_first(model: nn.Module) -> None:
    """Freeze the first matrix of every expert, by name as users do."""
    for name, param in model.named_parameters():
        if "deepspeed_experts" in name and name.endswith(("0_stacked.weight", ".0.weight")):
            param.requires_grad_(False)


def build(
    kind: str, size: int, settings: dict, options: dict, *, freeze: bool = False, **arguments: Any
) -> Any:
    """Initialise an engine by DeepSpeed's own function, for a layer of one kind."""
    torch.manual_seed(0)
    if kind == "unstacked":
        options = {**options, "comet_ds": {"stack_experts": False}}
    model = Model(CLASSES["deepspeed" if kind == "deepspeed" else "comet_ds"], **options)
    if freeze:
        freeze_first(model)
    made = {name: make(model) for name, make in arguments.items()}
    return deepspeed.initialize(model=model, config=config(size, **settings), **made)[0]


def load(engine: Any, folder: str, tag: str) -> Any:
    """Load a checkpoint into an engine whose weights are all wrong."""
    with torch.no_grad():
        for param in engine.module.parameters():
            param.add_(1.0)
    path, _ = engine.load_checkpoint(folder, tag=tag)
    assert path is not None
    return engine


# ---- comparing files ---------------------------------------------------------------------------


def assert_same(a: Any, b: Any, where: str, *, values: bool = True) -> None:
    """Assert that two files have the same content, in the same order, or all but its values."""
    assert type(a) is type(b), f"{where}: {type(a)} and {type(b)}"
    if torch.is_tensor(a):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), f"{where}: {a.shape} and {b.shape}"
        assert not values or torch.equal(a, b), f"{where}: {(a - b).abs().max()}"
    elif isinstance(a, dict):
        if where.endswith(".state"):  # in the order of the optimizer's first step
            a, b = dict(sorted(a.items())), dict(sorted(b.items()))
        assert list(a) == list(b), f"{where}: {list(a)} and {list(b)}"
        for key in a.keys() - {"ds_config", "ds_version"}:
            assert_same(a[key], b[key], f"{where}.{key}", values=values)
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), f"{where}: {len(a)} and {len(b)} items"
        for index, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}[{index}]", values=values)
    elif hasattr(a, "__dict__"):
        assert_same(vars(a), vars(b), where, values=values)
    else:
        assert a == b or not values, f"{where}: {a} and {b}"


def assert_same_files(folder: str, tag: str, other: str, *, values: bool = True) -> None:
    names = sorted(os.listdir(f"{folder}/{tag}"))
    assert names == sorted(os.listdir(f"{folder}/{other}"))
    for name in names:
        paths = [f"{folder}/{t}/{name}" for t in (tag, other)]
        if name.endswith(".pt"):
            assert_same(*(torch.load(p, weights_only=False) for p in paths), name, values=values)
        sizes = [os.path.getsize(path) for path in paths]
        assert abs(sizes[0] - sizes[1]) < 1024, f"{name}: {sizes} bytes"  # zip pads to 64


HALF, BRAIN = {"dtype": torch.float16}, {"dtype": torch.bfloat16}
# Less than a stack of matrices, more than a matrix: of 896 elements in the first layer.
SPLIT = {"limit": 1000}


def tied(layer: int) -> nn.Module:
    return TiedMLP(HIDDEN)


TIED1, TIED2 = ({**ep, "expert": tied} for ep in (EP1, EP2))


def fp32_weights(engine: Any) -> dict[str, Tensor]:
    """Return an engine's fp32 weights by name, asked of the optimizer."""
    optimizer, named = engine.optimizer, dict(engine.module.named_parameters())
    if hasattr(optimizer, "fp32_groups"):
        pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        found = {id(p): m for group in pairs for p, m in zip(*group, strict=True)}
    elif hasattr(optimizer, "fp32_groups_flat"):
        pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True)
        found = {
            id(p): m
            for ps, flat in pairs
            for p, m in zip(ps, flat.split([p.numel() for p in ps]), strict=True)
        }
    elif hasattr(optimizer, "round_robin_bit16_groups"):
        found = {}
        for index, params in enumerate(optimizer.round_robin_bit16_groups):
            part, group = (
                optimizer.single_partition_of_fp32_groups[index].detach(),
                optimizer.real_dp_process_group[index],
            )
            parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
            dist.all_gather(parts, part, group=group)
            flat, at = torch.cat(parts), 0
            for param in params:
                found[id(param)] = flat[at : at + param.numel()]
                at += param.numel()
    elif engine.zero_optimization():
        found = {id(p): safe_get_full_fp32_param(p) for p in named.values() if p.requires_grad}
    else:
        found = {}
    return {n: found.get(id(p), p).detach().reshape(p.shape).clone() for n, p in named.items()}


def save_weights(rank: int, size: int, folder: str, settings: dict, options: dict, **more: Any):
    dtype, limit = more.pop("dtype", torch.float32), more.pop("limit", None)
    with machine(limit, dtype):
        engine = build("deepspeed", size, settings, options, **more)
        train(engine, rank, STEPS, dtype)
        engine.save_checkpoint(folder, tag="saved")
        return fp32_weights(engine)
