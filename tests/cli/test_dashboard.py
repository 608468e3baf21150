# SPDX-License-Identifier: Apache-2.0
"""The W&B workspace has a panel for every metric, and is what W&B's library can read back."""

from __future__ import annotations

import json
import re
import sys

import pytest
import wandb_workspaces.workspaces as workspaces

from comet_ds.cli import dashboard
from comet_ds.observe.metrics import LAYER_METRICS, RUN_METRICS, layer_label


def panels(spec: dict) -> list[dict]:
    sections = spec["section"]["panel_bank_config"]["sections"]
    return [panel["config"] for section in sections for panel in section["panels"]]


def find(tree: object, key: str) -> list:
    """Return all values of a key in nested dictionaries and lists."""
    if isinstance(tree, list):
        return [value for item in tree for value in find(item, key)]
    if not isinstance(tree, dict):
        return []
    own = [tree[key]] if key in tree else []
    return own + [value for item in tree.values() for value in find(item, key)]


def test_printed_specification(capsys: pytest.CaptureFixture) -> None:
    dashboard.main(["--entity", "team", "--project", "moe", "--name", "mine", "--print"])
    view = json.loads(capsys.readouterr().out)
    assert (view["entity"], view["project"], view["display_name"]) == ("team", "moe", "mine")
    found = panels(view["spec"])
    assert [p["media_keys"] for p in found if "media_keys" in p] == [["comet_ds/timeline"]]
    assert "comet_ds/timeline_launches" in find(found, "key") + find(found, "val")
    found = [panel for panel in found if "metrics" in panel]
    labels = {label for panel in found for label in panel["metrics"]}
    assert {f"comet_ds/{name}" for name in RUN_METRICS} <= labels
    assert "Train/Samples/train_loss" in labels
    patterns = [panel["metric_regex"] for panel in found if panel["metric_regex"]]
    for name in LAYER_METRICS:
        shown = [p for p in patterns if re.fullmatch(p, f"{layer_label(11)}/{name}")]
        assert len(shown) == 1, name
    assert not any(re.fullmatch(p, "comet_ds/tokens_per_s") for p in patterns)
    # Runs are grouped by the kind of layer; W&B keeps a config's values under "value".
    (run_set,) = find(view["spec"], "grouping")
    assert run_set == [{"section": "config", "name": "comet_ds.value.moe"}]


def test_library_reads_it_back() -> None:
    made = dashboard.workspace("team", "moe")
    again = workspaces.Workspace._from_model(made._to_model())
    assert [s.name for s in again.sections] == [s.name for s in made.sections]
    assert [len(s.panels) for s in again.sections] == [len(s.panels) for s in made.sections]


def test_missing_library_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(SystemExit):
        dashboard.main(["--entity", "team", "--project", "moe"])
    assert "pip install wandb-workspaces" in capsys.readouterr().err
