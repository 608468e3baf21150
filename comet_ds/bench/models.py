# SPDX-License-Identifier: Apache-2.0
"""The models that ``comet_ds bench train`` trains: the example's, with one layer or another."""

from __future__ import annotations

import gc
import importlib.util
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from deepspeed import comm as dist
from torch import nn

import comet_ds
from comet_ds._compat.deepspeed import accelerator
from comet_ds.config import CometConfig

EXAMPLES = Path(comet_ds.__file__).parent.parent / "examples"
# The block of the configuration that has a layer's options, by the example's name of the layer.
BLOCKS = {"comet_ds": "comet_ds", "autoep": "expert_parallel", "deepspeed": None}


@dataclass(frozen=True)
class Workload:
    """A model and its training; most names are those of the example's options."""

    shape: str
    hidden: int
    ffn: int
    experts: int
    top_k: int
    layers: int
    heads: int
    seq_len: int
    batch: int  # sequences of a rank in a micro-batch
    micro_batches: int  # micro-batches of a step
    zero: int  # ZeRO stage
    capacity_factor: float = 1.0
    no_drop: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens of a rank in a step."""
        return self.batch * self.seq_len * self.micro_batches

    def flop_per_token(self, vocabulary: int) -> int:
        """Return the FLOP of forward and backward; ``bench/train.py`` says what counts."""
        expert = 3 * self.hidden * self.ffn
        matrices = 4 * self.hidden**2 + self.hidden * self.experts + self.top_k * expert
        scores = self.hidden * self.seq_len
        return 6 * (self.layers * (matrices + scores) + self.hidden * vocabulary)

    def describe(self) -> str:
        """Return a line with all sizes."""
        dropping = "no dropping" if self.no_drop else f"capacity factor {self.capacity_factor:g}"
        return (
            f"{self.shape}: {self.layers} layers, H {self.hidden}, F {self.ffn}, E {self.experts}, "
            f"k {self.top_k}, {self.heads} heads, {self.batch} x {self.seq_len} tokens a GPU and "
            f"micro-batch, {self.micro_batches} micro-batches, ZeRO {self.zero}, {dropping}"
        )


@dataclass(frozen=True)
class Variant:
    """A layer with options.

    Attributes:
        label: the text it was read from, which is printed.
        moe: the example's name of the layer.
        options: values for the layer's block of the configuration.
    """

    label: str
    moe: str
    options: dict[str, Any]

    @classmethod
    def parse(cls, label: str) -> Variant:
        """Read ``layer:key=value:key=value``; values are JSON, or else text.

        Raises:
            ValueError: unknown layer or option, or a bad value.
        """
        moe, *pairs = label.split(":")
        if moe not in BLOCKS:
            raise ValueError(f"unknown layer {moe!r}, known: {', '.join(BLOCKS)}")
        options = {}
        for pair in pairs:
            key, equals, text = pair.partition("=")
            if not equals:
                raise ValueError(f"an option must be key=value, got {pair!r} in {label!r}")
            try:
                options[key] = json.loads(text)
            except json.JSONDecodeError:
                options[key] = text
        if moe == "comet_ds":
            CometConfig.parse(options)
        elif options and BLOCKS[moe] is None:
            raise ValueError(f"{moe} takes no options, got {label!r}")
        elif moe == "autoep":
            from deepspeed.module_inject.auto_ep_config import AutoEPConfig

            if unknown := options.keys() - AutoEPConfig.__dataclass_fields__.keys():
                raise ValueError(f"AutoEP has no options {sorted(unknown)}")
        return cls(label, moe, options)


def load_example() -> ModuleType:
    """Import the example of this checkout.

    Raises:
        RuntimeError: there is no example next to the package.
    """
    path = EXAMPLES / "train_gpt_moe.py"
    if not path.exists():
        raise RuntimeError(
            f"the model to train is examples/train_gpt_moe.py, which is not at {path}: run this in "
            "a checkout, with `pip install -e .[examples]`"
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, "a Python file has both"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Run:
    """An engine in training, on batches that are on the device before it begins.

    Args:
        example: the example's module.
        work: the model and its training.
        variant: the layer.
        config: file of the DeepSpeed configuration; ``work`` replaces its batch and ZeRO stage.
        num_steps: number of steps to draw batches for.
        draw_experts: whether every expert gets weights of its own; DeepSpeed's layer and ours give
            all experts of a layer the same.
        scale: factor of the initial weights.

    Attributes:
        losses: loss of each step's last micro-batch, on this rank.
    """

    def __init__(
        self,
        example: ModuleType,
        work: Workload,
        variant: Variant,
        config: Path,
        num_steps: int,
        *,
        draw_experts: bool = False,
        scale: float = 1.0,
    ) -> None:
        args = SimpleNamespace(**asdict(work), moe=variant.moe, ep_size=dist.get_world_size())
        settings = json.loads(config.read_text())
        settings["train_micro_batch_size_per_gpu"] = work.batch
        settings["gradient_accumulation_steps"] = work.micro_batches
        settings["zero_optimization"] = {**settings["zero_optimization"], "stage": work.zero}
        blocks = {"comet_ds": settings.pop("comet_ds", {}), "autoep": example.autoep_block(args)}
        if block := BLOCKS[variant.moe]:
            settings[block] = blocks[variant.moe] | variant.options
        torch.manual_seed(0)
        with torch.device(accelerator().current_device_name()):
            model = example.GPT(args)
        if draw_experts:
            _draw_experts(model)
        if scale != 1:
            with torch.no_grad():
                for param in model.parameters():
                    param.mul_(scale)
        self.engine, *_ = comet_ds.initialize(
            model=model, model_parameters=model.parameters(), config=settings
        )
        rank, text = dist.get_rank(), example.load_text(None)
        drawn = (
            example.sample_batch(text, index, rank, work.batch, work.seq_len).to(self.engine.device)
            for index in range(num_steps * work.micro_batches)
        )
        self._batches = [[next(drawn) for _ in range(work.micro_batches)] for _ in range(num_steps)]
        self._example, self.losses = example, []
        torch.manual_seed(1 + rank)

    def train(self, num_steps: int) -> None:
        """Take steps; waits for the device only where DeepSpeed does."""
        for _ in range(num_steps):
            batches = self._batches[len(self.losses)]
            self.losses.append(self._example.train_step(self.engine, batches))

    def time_block(self, num_steps: int) -> float:
        """Return the ms of a step. Collective."""
        dist.barrier()
        accelerator().synchronize()
        start = time.perf_counter()
        self.train(num_steps)
        accelerator().synchronize()
        return 1e3 * (time.perf_counter() - start) / num_steps

    def time_phases(self) -> dict[str, float]:
        """Return the ms of a step's forwards, backwards and optimizer; waits after each."""
        times = {"forward": 0.0, "backward": 0.0, "optimizer": 0.0}

        def run(phase: str, function: Callable[[], Any]) -> Any:
            accelerator().synchronize()
            start = time.perf_counter()
            result = function()
            accelerator().synchronize()
            times[phase] += 1e3 * (time.perf_counter() - start)
            return result

        for tokens in self._batches[-1]:
            loss, l_aux = run("forward", lambda tokens=tokens: self.engine(tokens))
            total = loss + self._example.L_AUX_WEIGHT * l_aux
            run("backward", lambda total=total: self.engine.backward(total))
            run("optimizer", self.engine.step)
        return times

    def mean_losses(self) -> list[float]:
        """Return the losses, means over the ranks. Collective."""
        losses = torch.stack(self.losses).double()
        dist.all_reduce(losses)
        return (losses / dist.get_world_size()).tolist()

    def grad_norm(self) -> float:
        """Return the norm of all ranks' gradients in the last step, before clipping."""
        return float(self.engine.get_global_grad_norm())

    def free(self) -> None:
        """Free the engine's memory."""
        self.engine.destroy()
        del self.engine, self._batches
        gc.collect()
        accelerator().empty_cache()


def _draw_experts(model: nn.Module) -> None:
    """Give every expert weights of its own, the same in every class of layer."""
    torch.manual_seed(1 + dist.get_rank())
    weights = {name: w for name, w in model.state_dict().items() if ".deepspeed_experts." in name}
    drawn = {name: torch.randn_like(w) * w.shape[-1] ** -0.5 for name, w in weights.items()}
    model.load_state_dict(drawn, strict=False)
