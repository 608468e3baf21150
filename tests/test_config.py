# SPDX-License-Identifier: Apache-2.0
"""The "comet_ds" block: defaults, every kind of mistake, every form of configuration."""

from __future__ import annotations

import base64
import inspect
import json
from pathlib import Path

import deepspeed
import pytest
from helpers.training import config
from torch import nn

import comet_ds
from comet_ds.config import (
    ENGINE_OPTIONS,
    GROUP_OPTIONS,
    CometConfig,
    check_group_options,
    read_block,
)

BLOCK = {"path": "reference", "num_chunks": 4, "grouped_gemm": False, "metrics_interval": 7}
BAD: dict[str, tuple[object, str]] = {
    "misspelt key": ({"pth": "auto"}, r"unknown key 'pth' \(known: path, num_chunks"),
    "unknown path": ({"path": "fast"}, "path: .*'fast'"),
    "no chunks": ({"num_chunks": 0}, "num_chunks.*greater than or equal to 1, got 0"),
    "chunks in words": ({"num_chunks": "two"}, "num_chunks.*'two'"),
    "half a chunk": ({"num_chunks": 1.5}, "num_chunks.*1.5"),
    "a word for a boolean": ({"metrics": "yes"}, "metrics.*'yes'"),
    "no interval": ({"metrics_interval": 0}, "metrics_interval.*greater than or equal to 1, got 0"),
    "two mistakes": ({"grouped_gemm": 1, "x": 2}, "grouped_gemm.*unknown key 'x'"),
    "no object": ([], r"must be an object, got \[\]"),
}


def test_defaults() -> None:
    assert CometConfig.parse(None) == CometConfig.parse({}) == CometConfig()
    assert CometConfig().path == "auto" and CometConfig().metrics_interval is None


@pytest.mark.parametrize("name", BAD)
def test_bad_block(name: str) -> None:
    block, message = BAD[name]
    with pytest.raises(ValueError, match='"comet_ds".*' + message):
        CometConfig.parse(block)


def test_read_from_every_form(tmp_path: Path) -> None:
    settings = {"train_batch_size": 1, "comet_ds": BLOCK}
    file = tmp_path / "ds.json"
    # DeepSpeed reads hjson: comments are allowed.
    file.write_text("# comment\n" + json.dumps(settings))
    encoded = base64.urlsafe_b64encode(json.dumps(settings).encode()).decode()
    for form in (settings, str(file), file, encoded):
        assert CometConfig.parse(read_block(form)) == CometConfig(**BLOCK)
    assert read_block({"train_batch_size": 1}) is None and read_block(None) is None
    with pytest.raises(ValueError, match=r"no DeepSpeed configuration at 'missing\.json'"):
        read_block("missing.json")


def test_initialize_has_deepspeeds_signature() -> None:
    assert inspect.signature(comet_ds.initialize) == inspect.signature(deepspeed.initialize)


def test_initialize_refuses_a_bad_block_before_it_builds() -> None:
    with pytest.raises(ValueError, match="unknown key 'chunks'"):
        comet_ds.initialize(model=nn.Linear(2, 2), config={"comet_ds": {"chunks": 2}})


@pytest.mark.parametrize("options", [{"metrics": False}, CometConfig(timeline_step=3)], ids=str)
def test_layer_refuses_options_of_the_engine(options: object) -> None:
    """It would ignore them, also where they are the default."""
    with pytest.raises(ValueError, match=r"of the engine cannot be set for a layer: put it into"):
        comet_ds.MoE(16, nn.Linear(16, 16), comet_ds=options)
    for name in ENGINE_OPTIONS:
        value = getattr(CometConfig(), name)
        with pytest.raises(ValueError, match=f"{name} of the engine"):
            CometConfig.parse_layer({name: value, "path": "auto"})
    assert CometConfig.parse_layer({"path": "fused", "timeout_s": 5.0}).timeout_s == 5


def test_block_merges_over_a_layers_own_options() -> None:
    own = {"path": "reference", "num_chunks": 4, "refine": True}
    layer = comet_ds.MoE(16, nn.Linear(16, 16), comet_ds=own)
    expected = CometConfig(**own)
    assert layer.config == expected
    # A block's default value is a value too; the engine's options are none of the layer's.
    layer.configure(CometConfig(num_chunks="auto", timeout_s=5, metrics=False))
    assert layer.config == CometConfig(**{**own, "num_chunks": "auto", "timeout_s": 5})
    assert layer.deepspeed_moe.path == "reference"
    layer.configure(CometConfig(exact_gate=True))  # of another engine
    assert layer.config == CometConfig(**own, exact_gate=True)
    assert layer.deepspeed_moe.gate.exact_logits
    assert comet_ds.MoE(16, nn.Linear(16, 16), comet_ds=layer.config).config == layer.config


def check_engine(rank: int, size: int) -> list[CometConfig]:
    """Both ways to an engine merge, and both check what the layers of a group share."""
    settings = config(size, comet_ds={"num_chunks": 2, "metrics": False})
    found = []
    for initialize in (comet_ds.initialize, deepspeed.initialize):
        options = {"path": "reference", "num_chunks": 4}
        layer = comet_ds.MoE(16, nn.Linear(16, 16), 2, comet_ds=options)
        model = nn.Sequential(layer)
        initialize(model=model, model_parameters=model.parameters(), config=settings)
        found.append(layer.config)
    return found


def test_engines_merge_the_block(world) -> None:
    expected = CometConfig(path="reference", num_chunks=2)
    assert world(1).run(check_engine) == [[expected, expected]]


@pytest.mark.parametrize("name, other", [("timeout_s", 5), ("tuning_table", "x"), ("refine", True)])
def test_layers_of_a_group_share_its_options(name: str, other: object) -> None:
    assert name in GROUP_OPTIONS
    configs = [CometConfig(path="fused"), CometConfig(num_chunks=3)]
    check_group_options({"ep_size_2": configs, "ep_size_4": [CometConfig(**{name: other})]})
    with pytest.raises(ValueError, match=rf"{name} must be the same.*\(ep_size_2\), got .*{other}"):
        check_group_options({"ep_size_2": [*configs, CometConfig(**{name: other})]})


def check_shared(rank: int, size: int) -> str:
    layers = [
        comet_ds.MoE(16, nn.Linear(16, 16), 2, ep_size=2, comet_ds={"refine": refine})
        for refine in (True, False)
    ]
    model = nn.Sequential(*layers)
    with pytest.raises(ValueError) as caught:
        deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config(size))
    return str(caught.value)


def test_engine_checks_the_layers_of_a_group(world) -> None:
    for message in world(2).run(check_shared):
        assert "refine must be the same" in message and "got True and False" in message
