# SPDX-License-Identifier: Apache-2.0
"""Make a W&B workspace with the panels that a team which trains MoE models wants.

Examples:
    python -m comet_ds dashboard --entity my-team --project my-project
    python -m comet_ds dashboard --entity my-team --project my-project --print

It shows all runs of the project with one colour for each kind of MoE layer (DeepSpeed's or ours),
so that runs compare at a glance. Throughput and loss come first, then the times, the routing and
the CTA splits of every layer. ``--print`` writes the specification as JSON and needs no login.

Needs ``pip install wandb-workspaces``, and ``wandb login`` to save.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from comet_ds.cli.arguments import make_parser
from comet_ds.observe.metrics import LAYER_METRICS, RUN_METRICS

NAME = "Mixture of experts"
# DeepSpeed's own labels.
TRAINING = {
    "Train/Samples/train_loss": "training loss",
    "Train/Samples/lr": "learning rate",
}
TIMES = [n for n in LAYER_METRICS if n.endswith("_ms") or n.startswith("hidden_share")]
CTA_SPLIT = [name for name in LAYER_METRICS if name.endswith("_ctas")]
SAMPLES = "samples"


def workspace(entity: str, project: str, name: str = NAME) -> Any:
    """Return the workspace, not saved yet.

    Args:
        entity: W&B user or team.
        project: whose runs it shows.
        name: of the workspace.

    Raises:
        ImportError: wandb-workspaces is not installed.
    """
    _, workspaces = _library()
    routing = [metric for metric in LAYER_METRICS if metric not in (*TIMES, *CTA_SPLIT)]
    throughput = {f"comet_ds/{metric}": title for metric, title in RUN_METRICS.items()}
    sections = [
        _section("Throughput", [_line(label, title) for label, title in throughput.items()]),
        _section("Training", [_line(label, title) for label, title in TRAINING.items()]),
        _section("Time, by layer", [_by_layer(metric) for metric in TIMES]),
        _section("Timeline", _timeline()),
        _section("Routing, by layer", [_by_layer(metric) for metric in routing]),
        _section("CTA splits, by layer", [_by_layer(metric) for metric in CTA_SPLIT]),
    ]
    settings = workspaces.RunsetSettings(groupby=[workspaces.Config("comet_ds.moe")])
    return workspaces.Workspace(
        entity, project, name=name, sections=sections, runset_settings=settings
    )


def _library() -> tuple[ModuleType, ModuleType]:
    """Return the modules of wandb-workspaces for panels and for workspaces."""
    try:
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise ImportError("wandb-workspaces is needed: pip install wandb-workspaces") from error
    return reports, workspaces


def _section(name: str, panels: list[Any]) -> Any:
    _, workspaces = _library()
    layout = workspaces.SectionLayoutSettings(columns=2, rows=-(-len(panels) // 2))
    return workspaces.Section(name, panels=panels, is_open=True, layout_settings=layout)


def _line(label: str, title: str) -> Any:
    reports, _ = _library()
    return reports.LinePlot(title=title, y=[label], title_x=SAMPLES)


def _timeline() -> list[Any]:
    """Return the panels of a timeline, which a run with a ``timeline_step`` writes."""
    reports, _ = _library()
    return [
        reports.MediaBrowser(media_keys=["comet_ds/timeline"]),
        reports.WeavePanelSummaryTable(table_name="comet_ds/timeline_launches"),
    ]


def _by_layer(metric: str) -> Any:
    """Return a panel with a line for every layer, however many there are."""
    reports, _ = _library()
    pattern = rf"comet_ds_layer_\d+/{metric}"
    title = f"{metric}: {LAYER_METRICS[metric]}"
    return reports.LinePlot(title=title, metric_regex=pattern, title_x=SAMPLES)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("dashboard", __doc__)
    parser.add_argument("--entity", required=True, help="W&B user or team")
    parser.add_argument("--project", required=True, help="W&B project, as in the DeepSpeed JSON")
    parser.add_argument("--name", default=NAME, help="name of the workspace (default: %(default)s)")
    parser.add_argument("--print", action="store_true", help="print it as JSON and save nothing")
    return parser


def main(arguments: Sequence[str]) -> None:
    """Parse the command line, then save or print."""
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        made = workspace(args.entity, args.project, args.name)
    except ImportError as error:
        parser.error(str(error))
    if args.print:
        print(made._to_model().model_dump_json(indent=1))
    else:
        made.save()
