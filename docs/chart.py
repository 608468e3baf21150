# SPDX-License-Identifier: Apache-2.0
"""Draw whole-model training throughput as an SVG, from what ``comet_ds bench train`` has measured.

    python -m comet_ds bench train --ranks 2 --json result.json
    python docs/chart.py result.json --out docs/tokens_per_s.svg

Give several files to draw the workloads of several runs in one chart, in the order given. Needs
nothing but Python.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

TITLES = {
    "mixtral-8x7b": "Mixtral 8x7B",
    "phi-3.5-moe": "Phi-3.5-MoE",
    "qwen2-moe": "Qwen2-MoE",
    "olmoe": "OLMoE",
    "qwen3-30b": "Qwen3-30B-A3B",
}
LAYERS = {"autoep": "DeepSpeed AutoEP", "deepspeed": "DeepSpeed MoE"}
OURS = "comet_ds"

# Pixels.
WIDTH, MARGIN = 860, 24
BAR_HEIGHT, BAR_PITCH, GROUP_HEAD, GROUP_GAP, HEAD = 22, 28, 26, 16, 58
LABEL_WIDTH, VALUE_WIDTH = 210, 150
BAR_WIDTH = WIDTH - 2 * MARGIN - LABEL_WIDTH - VALUE_WIDTH
# Readable on the chart's own background, whatever the page's is.
BACKGROUND, INK, FAINT = "#ffffff", "#1f2328", "#59636e"
OUR_COLOR, OUR_VARIANT_COLOR, OTHER_COLOR = "#0969da", "#80b3f0", "#afb8c1"


@dataclass(frozen=True)
class Bar:
    """One layer's throughput: its label, tokens per second of all GPUs, and color."""

    label: str
    tokens_per_s: float
    color: str


@dataclass(frozen=True)
class Group:
    """The bars of one workload.

    Attributes:
        title: which model's layers, how many, and what else tells workloads apart.
        bars: a layer each, fastest first.
    """

    title: str
    bars: Sequence[Bar]


def read_groups(result: dict[str, Any]) -> Iterator[Group]:
    """Yield a group for each workload of one file of ``bench train --json``."""
    for work in result["workloads"]:
        name = TITLES.get(work["shape"], work["shape"])
        dropping = ", no dropping" if work["no_drop"] else ""
        title = f"{work['layers']} layers of {name}'s shape, ZeRO {work['zero']}{dropping}"
        rates = {label: found["tokens_per_s"] for label, found in work["variants"].items()}
        fastest_first = sorted(rates.items(), key=lambda item: -item[1])
        yield Group(title, [_bar(label, rate) for label, rate in fastest_first])


def _bar(label: str, rate: float) -> Bar:
    layer, *options = label.split(":")
    shown = ", ".join([LAYERS.get(layer, layer), *options])
    if layer != OURS:
        return Bar(shown, rate, OTHER_COLOR)
    return Bar(shown, rate, OUR_VARIANT_COLOR if options else OUR_COLOR)


def machine(results: Sequence[dict[str, Any]]) -> str:
    """Return what all results were measured on.

    Raises:
        ValueError: they differ in it, so that their bars cannot be compared.
    """
    found = {f"{result['num_ranks']} x {result['device']}" for result in results}
    if len(found) != 1:
        raise ValueError(f"results must be of equal machines, got {', '.join(sorted(found))}")
    return found.pop()


def draw(groups: Sequence[Group], title: str) -> str:
    """Return the chart as SVG; every bar has the same scale."""
    longest = max(bar.tokens_per_s for group in groups for bar in group.bars)
    y, parts = HEAD, []
    for group in groups:
        parts.append(_text(MARGIN, y + 12, group.title, weight=600))
        y += GROUP_HEAD
        rates = [bar.tokens_per_s for bar in group.bars if bar.color == OUR_COLOR]
        for bar in group.bars:
            ours = rates[0] if rates else None
            parts += _draw_bar(bar, y, bar.tokens_per_s / longest, ours)
            y += BAR_PITCH
        y += GROUP_GAP
    rates = [f"{bar.label} {bar.tokens_per_s:,.0f}" for group in groups for bar in group.bars]
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" '
        f'height="{y}" role="img" font-family="system-ui, sans-serif" font-size="13">',
        f"<title>{escape(title)}</title>",
        f"<desc>{escape('; '.join(rates))}</desc>",
        f'<rect width="{WIDTH}" height="{y}" rx="8" fill="{BACKGROUND}"/>',
        _text(MARGIN, 34, title, size=16, weight=600),
    ]
    return "\n".join([*head, *parts, "</svg>", ""])


def _draw_bar(bar: Bar, y: int, share: float, ours: float | None) -> Iterator[str]:
    x, baseline = MARGIN + LABEL_WIDTH, y + 16
    weight = 600 if bar.color == OUR_COLOR else 400
    yield _text(x - 10, baseline, bar.label, anchor="end", weight=weight)
    width = max(BAR_WIDTH * share, 1)
    yield (
        f'<rect x="{x}" y="{y}" width="{width:.1f}" height="{BAR_HEIGHT}" rx="3" '
        f'fill="{bar.color}"/>'
    )
    yield _text(x + width + 8, baseline, f"{bar.tokens_per_s:,.0f}", weight=weight)
    if ours is not None and bar.color != OUR_COLOR:
        ratio = f"comet_ds: {ours / bar.tokens_per_s:.1f}x"
        yield _text(WIDTH - MARGIN, baseline, ratio, anchor="end", color=FAINT)


def _text(
    x: float,
    y: float,
    text: str,
    *,
    anchor: str = "start",
    size: int = 13,
    weight: int = 400,
    color: str = INK,
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}" font-size="{size}" '
        f'font-weight="{weight}" fill="{color}">{escape(text)}</text>'
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Read the files named on the command line, write the chart."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+", help="JSON of `comet_ds bench train`")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("tokens_per_s.svg"))
    args = parser.parse_args(argv)
    results = [json.loads(path.read_text()) for path in args.results]
    try:
        title = f"Training, tokens per second of {machine(results)}"
    except ValueError as error:
        parser.error(str(error))
    groups = [group for result in results for group in read_groups(result)]
    args.out.write_text(draw(groups, title))


if __name__ == "__main__":
    main()
