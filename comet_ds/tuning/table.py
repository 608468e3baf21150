# SPDX-License-Identifier: Apache-2.0
"""Measured CTA splits: a table on disk, and the candidates that are worth measuring.

The table is a JSON file, by default ``~/.cache/comet_ds/tuning.json``. ``python -m comet_ds tune``
fills it, and so does a run with ``"refine": true``. A run reads it once, on rank 0 of each expert
parallel group, and then looks splits up in memory. An entry is valid for one device and its link,
one layer on one number of ranks, and one version of the kernels' sources. Entries of other versions
stay in the file and are not used.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from deepspeed.utils import logger

from comet_ds.tuning.cost_model import CtaSplit, GemmSplit, LayerShape, forward_splits

VERSION = 3
# An entry serves layers with up to this many times more or fewer tokens per rank.
MAX_DISTANCE = 2.0
# Candidates' numbers of communication CTAs, relative to the split they vary.
FACTORS = (0.5, 0.75, 1.0, 1.5, 2.0)


def default_path() -> Path:
    """Return the path of the user's table, which is used unless the configuration names another."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "comet_ds" / "tuning.json"


class Origin(NamedTuple):
    """Hardware and kernels with which splits are measured.

    Attributes:
        device: the GPU's name.
        link: the link between the GPUs, as ``fused.peer.memory.describe_link`` returns it.
        fingerprint: hash of the kernels' sources.
    """

    device: str
    link: str
    fingerprint: str


@dataclass(frozen=True)
class TuningKey:
    """The origin of an entry and the layer that it serves.

    Attributes:
        device, link, fingerprint: as in ``Origin``.
        num_ranks: W.
        dtype: "bfloat16" or "float16".
        hidden, ffn, num_ups, num_experts, top_k: as in ``LayerShape``.
    """

    device: str
    link: str
    fingerprint: str
    num_ranks: int
    dtype: str
    hidden: int
    ffn: int
    num_ups: int
    num_experts: int
    top_k: int

    @classmethod
    def of(cls, shape: LayerShape, origin: Origin) -> TuningKey:
        """Return the key of a layer."""
        sizes = (shape.hidden, shape.ffn, shape.num_ups, shape.num_experts, shape.top_k)
        return cls(*origin, len(shape.num_tokens), shape.dtype, *sizes)


class TuningTable:
    """Measured CTA splits by key and tokens per rank.

    Args:
        entries: as ``read`` returns them; damaged ones are left out.
    """

    def __init__(self, entries: Sequence[Mapping[str, Any]] = ()) -> None:
        self._found: dict[TuningKey, dict[int, CtaSplit]] = {}
        for entry in entries:
            try:
                key, num_tokens, cta_split = _parse(entry)
                self._found.setdefault(key, {})[num_tokens] = cta_split
            except (KeyError, TypeError, ValueError):
                continue

    def find(self, shape: LayerShape, origin: Origin) -> CtaSplit | None:
        """Return the split measured for a layer with the nearest number of tokens.

        None where there is no entry within ``MAX_DISTANCE``.
        """
        measured = self._found.get(TuningKey.of(shape, origin))
        if not measured:
            return None
        tokens = max(shape.mean_tokens, 1)
        nearest = min(measured, key=lambda count: abs(math.log(count / tokens)))
        if max(nearest / tokens, tokens / nearest) > MAX_DISTANCE:
            return None
        return measured[nearest] if is_legal(measured[nearest], shape) else None


def is_legal(cta_split: CtaSplit, shape: LayerShape) -> bool:
    """Whether the kernels can run a split.

    Each GEMM needs an even number of communication CTAs, at least 2 and at most half of the SMs;
    ``pull`` has none where copy engines push the tokens.
    """
    local = shape.num_experts // len(shape.num_tokens)
    with_ctas = cta_split[1:] if cta_split.is_pushed else cta_split
    return (
        all(
            c.num_comm_ctas % 2 == 0 and 2 <= c.num_comm_ctas <= shape.num_sms // 2
            for c in with_ctas
        )
        and all(0 <= c.num_split_experts <= local for c in with_ctas)
        and cta_split.push_grad.num_split_experts == 0
        and (not cta_split.is_pushed or cta_split.pull.num_split_experts == 0)
    )


def candidates(cta_split: CtaSplit, shape: LayerShape) -> dict[str, list[CtaSplit]]:
    """Return the splits worth measuring, by the field in which each differs from ``cta_split``."""

    def counts(num_ctas: int) -> list[int]:
        found = {2 * round(num_ctas * factor / 2) for factor in FACTORS}
        return sorted((found | {num_ctas + 2, num_ctas + 4, num_ctas + 8}) - {num_ctas})

    result: dict[str, list[CtaSplit]] = {}
    pulled, pushed = forward_splits(shape)
    for field, choice in cta_split._asdict().items():
        others = []
        if field == "pull":
            others.append(pulled if cta_split.is_pushed else pushed)
            choice = pulled if cta_split.is_pushed else choice
        others += [choice._replace(num_comm_ctas=count) for count in counts(choice.num_comm_ctas)]
        if field != "push_grad":
            local = shape.num_experts // len(shape.num_tokens)
            splits = {
                local,
                choice.num_split_experts // 2,
                min(2 * choice.num_split_experts, local),
            }
            splits.discard(choice.num_split_experts)
            others += [choice._replace(num_split_experts=count) for count in sorted(splits)]
        changed = (cta_split._replace(**{field: other}) for other in others)
        result[field] = [d for d in changed if is_legal(d, shape)]
    return result


def read(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a file; none where it is missing, damaged or of another version."""
    try:
        table = json.loads(path.read_text())
        if table["version"] != VERSION:
            raise ValueError(f"version {table['version']!r}, not {VERSION}")
        return list(table["entries"])
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning(f"comet_ds: no CTA splits from {path}: {error}")
        return []


def write(
    path: Path, shape: LayerShape, origin: Origin, cta_split: CtaSplit, ms: float | None = None
) -> None:
    """Add a measured split to a table; it replaces an entry for the same key and tokens.

    Other processes may write at the same time. A file that cannot be read is kept, with ".bad"
    after its name.

    Args:
        path: of the table.
        shape, origin: the layer, and where it was measured.
        cta_split: the split.
        ms: time of forward and backward with it, None where that was not timed.
    """
    key = TuningKey.of(shape, origin)
    num_tokens = shape.mean_tokens
    points = {field: list(choice[:2]) for field, choice in cta_split._asdict().items()}
    entry = {"key": vars(key), "num_tokens": num_tokens, "cta_split": points, "both_ms": ms}
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_name(path.name + ".lock")):
        entries = read(path)
        if not entries and path.exists():
            os.replace(path, path.with_name(path.name + ".bad"))
        same = {"key": entry["key"], "num_tokens": num_tokens}
        kept = [
            old
            for old in entries
            if isinstance(old, dict) and any(old.get(name) != same[name] for name in same)
        ]
        new = path.with_name(f"{path.name}.{os.getpid()}")
        new.write_text(json.dumps({"version": VERSION, "entries": [*kept, entry]}, indent=1))
        os.replace(new, path)  # a reader sees the old file or the new one, never a part


def _parse(entry: Mapping[str, Any]) -> tuple[TuningKey, int, CtaSplit]:
    key, num_tokens = TuningKey(**entry["key"]), entry["num_tokens"]
    points = [GemmSplit(*entry["cta_split"][field], seconds=0.0) for field in CtaSplit._fields]
    numbers = [num_tokens, *(value for point in points for value in point[:2])]
    if not all(type(number) is int for number in numbers) or num_tokens < 1:
        raise ValueError("numbers of an entry must be integers, and its tokens at least 1")
    return key, num_tokens, CtaSplit(*points)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
