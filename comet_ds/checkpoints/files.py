# SPDX-License-Identifier: Apache-2.0
"""The files of a checkpoint and their content. Tensors stay on disk until they are used.

mp_rank_00_model_states.pt                         all but the experts, and the run's settings
layer_<l>_expert_<e>_mp_rank_00_model_states.pt    expert e (of all ranks) of MoE layer l
[bf16_]zero_pp_rank_<r>_mp_rank_00_optim_states.pt ZeRO 1 and 2, BF16_Optimizer: rank r
expp_rank_<r>_mp_rank_00_optim_states.pt           ZeRO 0: expert parallel rank r of the largest
                                                   ep_size
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.constants import OPTIMIZER_STATE_DICT, ZERO_STAGE
from torch import Tensor

from comet_ds.checkpoints.names import Topology, count_experts, parse, renumber

MODEL_FILE = "mp_rank_00_model_states.pt"
_EXPERT_FILE = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_00_model_states\.pt")
_OPTIMIZER_FILE = re.compile(
    r"((?:bf16_)?zero_pp_rank_|expp_rank_)(\d+)_mp_rank_00_optim_states\.pt"
)

# Kinds of optimizer wrappers, which save different keys.
ZERO = "ZeRO"
BF16 = "BF16_Optimizer"
FP16_FLAT = "FP16_Optimizer"  # also of bf16
FP16_UNFUSED = "FP16_UnfusedOptimizer"  # also of bf16
PLAIN = "the optimizer itself"


@dataclass(frozen=True)
class LayerFiles:
    """An MoE layer's files.

    Attributes:
        prefix: part of its experts' names before the expert's number.
        paths: files of the experts, by global number.
    """

    prefix: str
    paths: list[Path]


@functools.lru_cache(maxsize=4096)
def _read(path: Path, modified: int) -> Mapping[str, Any]:
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)


def read(path: Path) -> Mapping[str, Any]:
    """Return a file's content; its tensors stay on disk until they are used."""
    return _read(path, path.stat().st_mtime_ns)


def _read_settings(config: Any) -> Mapping[str, Any] | None:
    """Return the DeepSpeed JSON of a run, None if it is a file that does not exist here."""
    if isinstance(config, Mapping):
        return config
    path = Path(str(config))
    return json.loads(path.read_text()) if path.is_file() else None


class Checkpoint:
    """A checkpoint of a model with MoE layers.

    Attributes:
        folder: the folder with the files.
        model: content of the model's file.
        settings: the DeepSpeed JSON of the run; None if it is not known.
        layers: files of the MoE layers' experts, in DeepSpeed's order.
        num_ranks: number of data parallel ranks that saved it.
        kind: kind of the optimizer's wrapper; None without an optimizer.
        num_optimizer_files: number of the optimizer's files.
        ep_sizes: ep_size of the layers by prefix; empty if no file has it.
    """

    @classmethod
    def open(
        cls, folder: str | Path, tag: str | None = None, config: str | Path | None = None
    ) -> Checkpoint:
        """Open a checkpoint.

        Args:
            folder: the folder given to ``save_checkpoint``, or the subfolder of a tag.
            tag: the checkpoint's tag; None for the latest.
            config: the DeepSpeed JSON of the run, needed if the checkpoint has only its path.

        Raises:
            ValueError: there is no checkpoint, or this package cannot read it.
        """
        folder = Path(folder)
        if tag is None and (folder / "latest").is_file():
            tag = (folder / "latest").read_text().strip()
        return cls(folder if tag is None else folder / tag, config)

    def __init__(self, folder: Path, config: str | Path | None) -> None:
        self.folder = folder
        self._check_files()
        self.model = read(folder / MODEL_FILE)
        self.settings = _read_settings(config or self.model.get("ds_config") or {})
        self.layers = self._find_layers()
        self.num_ranks: int = self.model["dp_world_size"]
        found: dict[str, dict[int, Path]] = {}
        for path in folder.iterdir():
            if match := _OPTIMIZER_FILE.fullmatch(path.name):
                found.setdefault(match[1], {})[int(match[2])] = path
        if len(found) > 1:
            raise ValueError(f"{folder} has optimizer files of two kinds: {sorted(found)}")
        self.prefix, paths = next(iter(found.items()), ("", {}))
        is_zero = self.prefix.endswith("zero_pp_rank_")
        self.num_optimizer_files = self.num_ranks if is_zero else len(paths)
        if missing := sorted(set(range(self.num_optimizer_files)) - set(paths)):
            name = self.optimizer_name(missing[0])
            raise ValueError(f"{folder} lacks {len(missing)} optimizer files, such as {name}")
        self.kind = self._find_kind()
        self.topology = Topology(
            self.num_ranks, bool(self.setting("use_data_before_expert_parallelism"))
        )
        self.ep_sizes = self._find_ep_sizes()

    def _check_files(self) -> None:
        models = sorted(self.folder.glob("mp_rank_*_model_states.pt"))
        if not (self.folder / MODEL_FILE).is_file():
            raise ValueError(
                f"{self.folder} must be a DeepSpeed checkpoint of a model with MoE layers at ZeRO "
                f"stage 0, 1 or 2, but has no {MODEL_FILE}"
            )
        if len(models) > 1:
            raise ValueError(
                f"tensor and pipeline parallel checkpoints are not supported, got {len(models)} "
                f"model files in {self.folder}"
            )

    def _find_layers(self) -> list[LayerFiles]:
        if not isinstance(self.model.get("num_experts"), list):
            raise ValueError(f"{self.folder} was saved by a model without MoE layers")
        if self.model.get("ds_autoep_layers"):
            raise ValueError(f"{self.folder} has AutoEP layers: use DeepSpeed's ds_to_universal")
        found: dict[int, dict[int, Path]] = {}
        for path in self.folder.iterdir():
            if match := _EXPERT_FILE.fullmatch(path.name):
                found.setdefault(int(match[1]), {})[int(match[2])] = path
        layers = []
        for index, num_experts in enumerate(self.model["num_experts"]):
            paths = found.get(index, {})
            if missing := sorted(set(range(num_experts)) - set(paths)):
                raise ValueError(
                    f"{self.folder} lacks the files of {len(missing)} of {num_experts} experts of "
                    f"MoE layer {index}, such as layer_{index}_expert_{missing[0]}_{MODEL_FILE}"
                )
            if (parts := parse(next(iter(read(paths[0]))))) is None:
                raise ValueError(f"{paths[0]} has something else than an expert's parameters")
            layers.append(LayerFiles(parts.layer, [paths[i] for i in range(num_experts)]))
        return layers

    def _find_kind(self) -> str | None:
        if self.num_optimizer_files == 0:
            return None
        state = self.optimizer(0)
        if self.is_partitioned:
            return ZERO if ZERO_STAGE in state else BF16
        if state is None:
            return None
        if "fp32_groups_flat" in state:
            return FP16_FLAT
        return FP16_UNFUSED if "fp32_groups" in state else PLAIN

    @property
    def zero_stage(self) -> int | None:
        """The ZeRO stage; None without an optimizer, whose files have it."""
        if self.kind is None:
            return None
        if self.kind == BF16:
            return 1
        return int(self.optimizer(0)[ZERO_STAGE]) if self.kind == ZERO else 0

    def setting(self, *keys: str) -> Any:
        """Return a setting of the run's DeepSpeed JSON, None if it is not set or not known."""
        value: Any = self.settings
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def _find_ep_sizes(self) -> dict[str, int]:
        """Return each layer's ep_size, from local names in the model's file or names of groups."""
        listed = [name for group in self.model.get("param_shapes") or [] for name in group]
        for key in ("frozen_param_shapes", "shared_params", "buffer_names"):
            listed += list(self.model.get(key) or [])
        counts = count_experts(listed)
        if not counts and self.kind is not None and not self.is_partitioned:
            sizes = {g["name"] for g in self.param_groups(0) if g.get("moe")}
            sizes = {int(name.removeprefix("ep_size_")) for name in sizes}
            if len(sizes | {self.num_optimizer_files}) > 1:
                raise ValueError(
                    "layers with different ep_size are not supported at ZeRO stage 0, got "
                    f"{sorted(sizes)} and {self.num_optimizer_files} optimizer files"
                )
            return {layer.prefix: self.num_optimizer_files for layer in self.layers}
        return {
            layer.prefix: len(layer.paths) // counts[layer.prefix]
            for layer in self.layers
            if layer.prefix in counts
        }

    # ---- the optimizer's files -----------------------------------------------------------------

    @property
    def is_partitioned(self) -> bool:
        """Whether each rank's file holds a partition of every group."""
        return self.prefix.endswith("zero_pp_rank_")

    def optimizer_name(self, number: int) -> str:
        """Return an optimizer file's name."""
        return f"{self.prefix}{number}_mp_rank_00_optim_states.pt"

    def optimizer_file(self, number: int) -> Mapping[str, Any]:
        """Return the content of an optimizer file."""
        return read(self.folder / self.optimizer_name(number))

    @property
    def optimizer_key(self) -> str:
        """The key of the optimizer's state_dict in an optimizer file."""
        return OPTIMIZER_STATE_DICT if self.is_partitioned else "optimizer"

    def optimizer(self, number: int) -> Any:
        """Return the optimizer's state_dict in a file."""
        return self.optimizer_file(number)[self.optimizer_key]

    @property
    def base_key(self) -> str | None:
        """The key of the wrapped optimizer's state_dict; None if nothing wraps it."""
        keys: dict[str | None, str | None] = {
            ZERO: "base_optimizer_state",
            BF16: "base_optimizer_state",
            PLAIN: None,
        }
        return keys.get(self.kind, OPTIMIZER_STATE_DICT)

    @property
    def masters_key(self) -> str | None:
        """The key of the fp32 weights in the state_dict; None if it has none."""
        keys: dict[str | None, str] = {
            ZERO: "single_partition_of_fp32_groups",
            BF16: "single_partition_of_fp32_groups",
            FP16_FLAT: "fp32_groups_flat",
            FP16_UNFUSED: "fp32_groups",
        }
        return keys.get(self.kind)

    def base(self, number: int) -> Any:
        """Return the wrapped optimizer's state_dict in a file."""
        state = self.optimizer(number)
        base = state if self.base_key is None else state[self.base_key]
        if not isinstance(base, Mapping):
            raise ValueError('"elastic_checkpoint" is not supported: it keeps no optimizer groups')
        return base

    def param_groups(self, number: int) -> list[Mapping[str, Any]]:
        """Return the optimizer's groups, without parameters."""
        return self.base(number)["param_groups"]

    # ---- the model -----------------------------------------------------------------------------

    def local_experts(self, ep_sizes: Mapping[str, int]) -> dict[str, int]:
        """Return the number of experts of a rank by layer, for the given ep_sizes."""
        return {
            layer.prefix: len(layer.paths) // ep_sizes[layer.prefix]
            for layer in self.layers
            if layer.prefix in ep_sizes
        }

    def names(self) -> list[str]:
        """Return the names of the whole model's state_dict, experts numbered globally."""
        found = list(self.model["module"])
        for layer in self.layers:
            path = layer.prefix.removesuffix("experts.deepspeed_experts.")
            places = [i for i, name in enumerate(found) if name.startswith(path)]
            place = places[-1] + 1 if places else len(found)
            found[place:place] = [name for path in layer.paths for name in read(path)]
        return found

    def tensor(self, name: str) -> Tensor:
        """Return a tensor of the whole model from the model's or an expert's file."""
        parts = parse(name)
        if parts is None:
            return self.model["module"][name]
        layer = next(layer for layer in self.layers if layer.prefix == parts.layer)
        return read(layer.paths[parts.expert])[name]

    def buffer_names(self) -> set[str]:
        """Return the names of the whole model's buffers."""
        found = set()
        for name in self.model.get("buffer_names") or []:
            parts = parse(name)
            layer = next((x for x in self.layers if parts and x.prefix == parts.layer), None)
            if parts is None or layer is None:
                found.add(name)
            else:
                found |= {str(parts._replace(expert=i)) for i in range(len(layer.paths))}
        return found


def offsets(
    checkpoint: Checkpoint, ep_sizes: Mapping[str, int], topology: Topology, rank: int
) -> dict[str, int]:
    """Return the global number of a rank's first expert, by layer.

    Args:
        checkpoint: gives the layers.
        ep_sizes: ep_size of the layers by prefix.
        topology: the ranks.
        rank: data parallel rank.
    """
    counts = checkpoint.local_experts(ep_sizes)
    return {
        prefix: topology.ep_rank(rank, ep_sizes[prefix]) * count for prefix, count in counts.items()
    }


def to_global(name: str, first: Mapping[str, int]) -> str:
    """Return the global name for a local one; ``first`` is the result of ``offsets``."""
    parts = parse(name)
    return name if parts is None else renumber(name, first[parts.layer])
