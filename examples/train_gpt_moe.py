# SPDX-License-Identifier: Apache-2.0
"""Train a byte-level GPT with mixture-of-experts layers through the deepspeed launcher.

    deepspeed --num_gpus 2 examples/train_gpt_moe.py --deepspeed_config examples/ds_config.json

``--moe deepspeed`` runs the same script with DeepSpeed's own layer; only the class in ``build_moe``
differs. With ``--moe autoep`` DeepSpeed's AutoEP replaces plain modules by its own layers, which
drop no tokens and compute no auxiliary loss; the script adds the block of the configuration that
AutoEP needs. The training text is
Python's standard library, or the file given with ``--data``.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import sysconfig
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from tqdm import tqdm

import comet_ds
from comet_ds.op_builder.locks import describe_stale_lock, find_stale_locks

NUM_BYTES = 256
L_AUX_WEIGHT = 0.01


class ExpertMLP(nn.Module):
    """SwiGLU MLP, [..., H] -> [..., H]."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, ffn, bias=False)
        self.up_proj = nn.Linear(hidden, ffn, bias=False)
        self.down_proj = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class PlainMoE(nn.Module):
    """A router and all experts. AutoEP replaces it by its layer, so it has no forward."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        expert = ExpertMLP(args.hidden, args.ffn)
        self.experts = nn.ModuleList(copy.deepcopy(expert) for _ in range(args.experts))
        self.gate = nn.Linear(args.hidden, args.experts, bias=False)


def autoep_block(args: argparse.Namespace) -> dict[str, Any]:
    """Return the configuration block that tells AutoEP which modules to replace."""
    return {
        "enabled": True,
        "autoep_size": args.ep_size,
        "moe_layer_pattern": r"blocks\.\d+\.moe",
        "expert_w1": "gate_proj",
        "expert_w2": "down_proj",
        "expert_w3": "up_proj",
        "top_k": args.top_k,
        "route_norm": args.top_k > 1,  # as in the other layers
        "use_grouped_mm": torch.cuda.is_available(),
    }


def build_moe(args: argparse.Namespace) -> nn.Module:
    """Return a mixture-of-experts MLP; with one seed, all kinds start with the same weights."""
    if args.moe == "autoep":
        return PlainMoE(args)
    moe_class = comet_ds.MoE if args.moe == "comet_ds" else deepspeed.moe.layer.MoE
    return moe_class(
        args.hidden,
        ExpertMLP(args.hidden, args.ffn),
        num_experts=args.experts,
        ep_size=args.ep_size,
        k=args.top_k,
        capacity_factor=args.capacity_factor,
        drop_tokens=not args.no_drop,
    )


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, hidden: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.proj = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        heads = self.qkv(x).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*heads, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(batch, length, hidden))


class Block(nn.Module):
    """Attention and a mixture-of-experts MLP, each after a norm."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(args.hidden), nn.LayerNorm(args.hidden)
        self.attention = Attention(args.hidden, args.heads)
        self.moe = build_moe(args)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | float]:
        x = x + self.attention(self.norm1(x))
        y = self.moe(self.norm2(x))
        y, l_aux = (y, 0.0) if isinstance(y, Tensor) else y[:2]  # AutoEP's returns y alone
        return x + y, l_aux


class GPT(nn.Module):
    """Byte-level language model; returns the cross entropy and the mean auxiliary loss."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.embed = nn.Embedding(NUM_BYTES, args.hidden)
        self.position = nn.Embedding(args.seq_len, args.hidden)
        self.blocks = nn.ModuleList(Block(args) for _ in range(args.layers))
        self.norm = nn.LayerNorm(args.hidden)
        self.head = nn.Linear(args.hidden, NUM_BYTES, bias=False)
        for embedding in (self.embed, self.position):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor | float]:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        x = self.embed(inputs) + self.position.weight[: inputs.shape[1]]
        l_aux = 0.0
        for block in self.blocks:
            x, block_l_aux = block(x)
            l_aux = l_aux + block_l_aux
        logits = self.head(self.norm(x)).float()
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return loss, l_aux / len(self.blocks)


def load_text(path: str | None) -> Tensor:
    """Return the training text as bytes, [N] uint8."""
    if path is not None:
        text = Path(path).read_bytes()
    else:
        sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        text = b"".join(source.read_bytes() for source in sources)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def sample_batch(text: Tensor, step: int, rank: int, batch: int, seq_len: int) -> Tensor:
    """Return [batch, seq_len + 1] random windows; they depend on step and rank only."""
    generator = torch.Generator().manual_seed(1_000_003 * step + rank)
    starts = torch.randint(len(text) - seq_len - 1, (batch,), generator=generator)
    return torch.stack([text[s : s + seq_len + 1] for s in starts.tolist()]).long()


def train_step(engine: Any, micro_batches: Iterable[Tensor]) -> Tensor:
    """Take an optimizer step; return the last micro-batch's loss without waiting for the GPU."""
    for tokens in micro_batches:
        loss, l_aux = engine(tokens)
        engine.backward(loss + L_AUX_WEIGHT * l_aux)
        engine.step()
    return loss.detach()


def parse_args() -> argparse.Namespace:
    """Parse the command line, which includes DeepSpeed's own options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--moe", choices=["comet_ds", "deepspeed", "autoep"], default="comet_ds")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps in all")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--ffn", type=int, default=256, help="FFN width of an expert")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--experts", type=int, default=8, help="experts of a layer, all ranks")
    parser.add_argument("--ep-size", type=int, default=None, help="default: all ranks")
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--capacity-factor", type=float, default=1.25)
    parser.add_argument("--no-drop", action="store_true", help="keep tokens beyond the capacity")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--data", help="text file to train on; default: Python's standard library")
    parser.add_argument("--save", help="folder for checkpoints; resumes from it if it has one")
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    parser = deepspeed.add_config_arguments(parser)
    args = parser.parse_args()
    if args.deepspeed_config is None:
        args.deepspeed_config = str(Path(__file__).with_name("ds_config.json"))
    return args


def accelerator() -> Any:
    """Return DeepSpeed's accelerator, which its annotations take for optional."""
    return get_accelerator()


def start_ranks() -> tuple[int, int]:
    """Join the launcher's process group; return this rank and the number of ranks."""
    accelerator().set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if not torch.cuda.is_available():  # DeepSpeed compiles its communication at first use
        for lock in find_stale_locks("deepspeed_shm_comm"):
            sys.exit(describe_stale_lock(lock))
    deepspeed.init_distributed()
    rank, world_size = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    if not torch.cuda.is_available():  # ranks that share cores stall each other's threads
        torch.set_num_threads(max(1, os.cpu_count() // world_size))
    return rank, world_size


def main() -> None:
    """Train, print the losses, save checkpoints."""
    args = parse_args()
    rank, world_size = start_ranks()
    args.ep_size = args.ep_size or world_size
    torch.manual_seed(0)
    with torch.device(accelerator().current_device_name()):
        model = GPT(args)
    config = json.loads(Path(args.deepspeed_config).read_text())
    if args.moe == "autoep":
        config["expert_parallel"] = autoep_block(args)
    engine, *_ = comet_ds.initialize(
        model=model, model_parameters=model.parameters(), config=config
    )
    if args.save and (Path(args.save) / "latest").exists():
        engine.load_checkpoint(args.save)
    first_step = engine.global_steps
    text = load_text(args.data)
    if len(text) < args.seq_len + 2:
        raise ValueError(f"the text must be longer than --seq-len + 1, got {len(text)} bytes")
    batch = engine.train_micro_batch_size_per_gpu()
    tokens_per_step = engine.train_batch_size() * args.seq_len
    torch.manual_seed(1 + rank + first_step)

    bar = tqdm(
        range(first_step, args.steps), initial=first_step, total=args.steps, disable=rank > 0
    )
    losses: list[float] = []
    start, timed_from = time.perf_counter(), first_step
    num_micro = engine.gradient_accumulation_steps()
    for step in bar:
        indices = range(step * num_micro, (step + 1) * num_micro)
        drawn = (sample_batch(text, index, rank, batch, args.seq_len) for index in indices)
        loss = train_step(engine, (tokens.to(engine.device) for tokens in drawn))
        if step == first_step and args.steps - first_step < 20:
            losses.append(loss.item())  # a short run has hardly another to compare with
        if step % 10 == 9 or step == args.steps - 1:
            losses.append(loss.item())
            if engine.monitor.enabled:
                engine.monitor.write_events([("Train/loss", losses[-1], engine.global_samples)])
            shown = {"loss": f"{losses[-1]:.3f}"}
            if timed_from == first_step:  # the first ten steps warm up and do not count
                start, timed_from = time.perf_counter(), step + 1
            else:
                rate = (step + 1 - timed_from) * tokens_per_step / (time.perf_counter() - start)
                shown["tokens_per_s"] = f"{rate:,.0f}"
            bar.set_postfix(shown)
        if args.save and ((step + 1) % args.save_every == 0 or step == args.steps - 1):
            engine.save_checkpoint(args.save)
    if rank == 0 and losses:
        summary = f"{args.moe}: loss {losses[0]:.3f} -> {losses[-1]:.3f}"
        if timed_from not in (first_step, args.steps):
            summary += f", {rate:,.0f} tokens/s"
        if torch.cuda.is_available():
            summary += f", peak memory {torch.cuda.max_memory_allocated() / 2**20:,.0f} MiB a GPU"
        print(summary)
    deepspeed.comm.destroy_process_group()  # its threads must not outlive the interpreter


if __name__ == "__main__":
    main()
