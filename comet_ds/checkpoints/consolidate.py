# SPDX-License-Identifier: Apache-2.0
"""Write a checkpoint's whole model into one file, with DeepSpeed's names and all experts.

Trained parameters are read from the optimizer's fp32 weights if it has them, everything else from
the model's files. Only one parameter is in memory at a time: the file is laid out first and filled
through a memory map.
"""

from __future__ import annotations

import contextlib
import json
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import set_default_mmap_options, skip_data

from comet_ds._compat.torch import fake_tensors
from comet_ds.checkpoints.entries import UNKNOWN
from comet_ds.checkpoints.files import BF16, FP16_FLAT, FP16_UNFUSED, ZERO, Checkpoint
from comet_ds.checkpoints.groups import Elements, read_entries, read_groups
from comet_ds.checkpoints.names import parse
from comet_ds.checkpoints.states import MASTERS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Names of dtypes in safetensors: https://github.com/huggingface/safetensors#format
_SAFETENSORS_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class Weights:
    """A checkpoint's parameters and buffers under DeepSpeed's names, experts numbered globally.

    Args:
        checkpoint: a checkpoint of DeepSpeed's or comet_ds's layer.
        dtype: dtype of floating point parameters; buffers keep their own.

    Attributes:
        tensors: shape and dtype of every tensor, by name.

    Raises:
        ValueError: the parameters of some fp32 weights of the optimizer cannot be determined.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self._checkpoint, self._dtype = checkpoint, dtype
        self._buffers = checkpoint.buffer_names()
        self._masters: dict[str, Tensor] = {}
        self._elements: Elements | None = None
        self._shapes: dict[str, torch.Size] = {}
        if checkpoint.kind in (ZERO, BF16, FP16_FLAT):
            self._elements = Elements.of(checkpoint)
            for group in self._elements.groups:
                self._shapes |= {native.name: native.shape for native in group}
        elif checkpoint.kind == FP16_UNFUSED:
            for group in read_entries(checkpoint, read_groups(checkpoint)):
                self._masters |= {name: entry[MASTERS] for name, entry in group.items()}
        if unknown := [n for n in (*self._trained(), *self._masters) if n.startswith(UNKNOWN)]:
            raise ValueError(
                f"cannot tell which parameters {len(unknown)} of the optimizer's fp32 weights are: "
                "they are not in the model's order"
            )
        self.tensors = self._find_tensors()

    def _trained(self) -> Mapping[str, Any]:
        return {} if self._elements is None else self._elements.places

    def _find_tensors(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        names = self._checkpoint.names()
        known = set(names)
        self._sources = self._find_sources(names)
        tensors = {}
        for name in names:
            own = self._checkpoint.tensor(name)
            is_cast = own.is_floating_point() and name not in self._buffers
            tensors[name] = own.shape, self._dtype if is_cast else own.dtype
        # If a layer's path contains "expert", DeepSpeed leaves the layer's other parameters out of
        # the model's file; the optimizer has them.
        for name in self._trained():
            if name not in known:
                tensors[name] = self._shape(name), self._dtype
                self._sources[name] = name
        return tensors

    def _find_sources(self, names: list[str]) -> dict[str, str]:
        """Return, by name, the name whose fp32 weights to use: its own, or that it is tied to."""
        masters = {*self._trained(), *self._masters}
        found = {name: name for name in masters}
        for name, other in (self._checkpoint.model.get("shared_params") or {}).items():
            parts, target = parse(name), parse(other)
            if parts is None or target is None:
                found.update({name: other} if other in masters else {})
                continue
            for tied in names:
                if (own := parse(tied)) and (own.layer, own.rest) == (parts.layer, parts.rest):
                    found[tied] = str(target._replace(expert=own.expert))
        if self._checkpoint.kind in (FP16_FLAT, FP16_UNFUSED):
            self._find_tied(names, masters, found)
        return found

    def _find_tied(self, names: list[str], masters: set[str], found: dict[str, str]) -> None:
        """Find tied parameters by equal values, because files of ZeRO 0 do not name them."""
        for name in names:
            if name in found or name in self._buffers:
                continue
            parts, own = parse(name), self._checkpoint.tensor(name)
            for other in masters:
                theirs = parse(other)
                if (parts and parts[:2]) != (theirs and theirs[:2]):
                    continue
                if other in names and torch.equal(self._checkpoint.tensor(other), own):
                    found[name] = other
                    break

    def _shape(self, name: str) -> torch.Size:
        parts = parse(name)
        return self._shapes[name if parts is None else str(parts._replace(expert=0))]

    def read(self, name: str) -> Tensor:
        """Return a tensor of ``tensors``."""
        shape, dtype = self.tensors[name]
        source = self._sources.get(name)
        if source is None or name in self._buffers:
            return self._checkpoint.tensor(name).detach().to(dtype)
        if self._elements is not None:
            return self._elements.weights(source).view(shape).to(dtype)
        return self._masters[source].detach().view(shape).to(dtype)


def consolidate(checkpoint: Checkpoint, path: str | Path, *, dtype: str = "fp32") -> Path:
    """Write the whole model into one file.

    Args:
        checkpoint: a checkpoint of DeepSpeed's or comet_ds's layer.
        path: the file to write; in safetensors format if it ends with ".safetensors", otherwise in
            ``torch.save``'s.
        dtype: "fp32" or "bf16"; dtype of floating point parameters, buffers keep their own.

    Returns:
        The path.

    Raises:
        ValueError: another dtype, a file that exists, a checkpoint that cannot be read.
    """
    path = Path(path)
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if path.exists():
        raise ValueError(f"{path} exists already")
    weights = Weights(checkpoint, DTYPES[dtype])
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    is_safetensors = path.suffix == ".safetensors"
    write = _write_safetensors if is_safetensors else _write_torch
    write(weights, partial)
    partial.replace(path)
    return path


def _write_torch(weights: Weights, path: Path) -> None:
    with fake_tensors():
        empty = {name: torch.empty(s, dtype=d) for name, (s, d) in weights.tensors.items()}
    with skip_data(materialize_fake_tensors=True):
        torch.save(empty, path)
    with _writable_maps():
        mapped = torch.load(path, mmap=True)
    for name, tensor in mapped.items():
        tensor.copy_(weights.read(name))


@contextlib.contextmanager
def _writable_maps() -> Iterator[None]:
    """Make ``torch.load(mmap=True)`` return tensors that write to the file."""
    with set_default_mmap_options(mmap.MAP_SHARED):
        yield


def _write_safetensors(weights: Weights, path: Path) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (shape, dtype) in weights.tensors.items():
        if dtype not in _SAFETENSORS_NAMES:
            raise ValueError(f"safetensors has no {dtype}, which {name} is: write a .pt file")
        end = at + shape.numel() * dtype.itemsize
        kind = _SAFETENSORS_NAMES[dtype]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in weights.tensors:
            tensor = weights.read(name).contiguous().flatten()
            file.write(tensor.view(torch.uint8).numpy().data)
