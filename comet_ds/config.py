# SPDX-License-Identifier: Apache-2.0
"""The optional "comet_ds" block of the DeepSpeed JSON."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import hjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

CONFIG_KEY = "comet_ds"


class CometConfig(BaseModel):
    """Options of comet_ds; every one has a default that suits most runs.

    Attributes:
        path: "auto" takes the best path that can run; "reference", "pipelined" or "fused" pins one.
        num_chunks: chunks a layer's rows are cut into to overlap communication with computation;
            "auto" takes 1 where nothing is communicated.
        exact_gate: compute gate logits with DeepSpeed's own operation everywhere; see ``TopKGate``.
        grouped_gemm: use torch's grouped GEMM where it applies (path "pipelined").
        stack_experts: keep each matrix of all local experts in one parameter (``stacked.py``);
            false keeps one parameter per expert, as DeepSpeed does. A layer that was built with
            false stays so.
        timeout_s: seconds to wait for another rank of the expert parallel group before the error
            that names it. What only the device waits for (NCCL's all-to-alls, path "pipelined")
            has the process group's timeout.
        tuning_table: file of ``comet_ds tune``; None takes the user's (path "fused"). That of a
            group's first layer serves all its layers.
        refine: measure CTA splits that the table has not, in a run's first forwards, and keep
            the best, also in the table (path "fused"). For all layers of a group if for its first.
        max_rows_factor: most rows a rank computes without dropping, as a multiple of the even share
            of all ranks' routes (path "fused", ep_size above 1). Memory is reserved for them, a
            routing that exceeds them is an error, and CUDA graphs can capture the layer. None
            reads the number of rows on the host in every forward and allocates what they need.
        metrics: write metrics to DeepSpeed's monitor when one is enabled.
        metrics_interval: steps between two writes; None takes DeepSpeed's steps_per_print.
        timeline_step: step of which the first layer's timeline is recorded (path "fused"); the
            kernels are compiled once more for it. None records nothing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    path: Literal["auto", "reference", "pipelined", "fused"] = "auto"
    num_chunks: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    exact_gate: bool = False
    grouped_gemm: bool = True
    stack_experts: bool = True
    timeout_s: float = Field(default=600, gt=0, le=10**6)
    tuning_table: str | None = None
    refine: bool = False
    max_rows_factor: float | None = Field(default=None, ge=1)
    metrics: bool = True
    metrics_interval: int | None = Field(default=None, ge=1)
    timeline_step: int | None = Field(default=None, ge=1)

    @classmethod
    def parse(cls, block: Mapping[str, Any] | CometConfig | None) -> CometConfig:
        """Validate a block.

        Raises:
            ValueError: naming every unknown key and every bad value.
        """
        if isinstance(block, cls):
            return block
        if not isinstance(block, Mapping | None):
            raise ValueError(f'"{CONFIG_KEY}" must be an object, got {block!r}')
        try:
            return cls(**(block or {}))
        except ValidationError as error:
            known = ", ".join(cls.model_fields)
            faults = [
                f"unknown key {item['loc'][0]!r} (known: {known})"
                if item["type"] == "extra_forbidden"
                else f"{item['loc'][0]}: {item['msg']}, got {item['input']!r}"
                for item in error.errors()
            ]
            raise ValueError(f'"{CONFIG_KEY}": ' + "; ".join(dict.fromkeys(faults))) from error


def read_block(config: Any) -> Mapping[str, Any] | None:
    """Return the "comet_ds" block of a DeepSpeed configuration, None where there is none.

    Args:
        config: what ``deepspeed.initialize`` accepts: a dict, the path of a JSON file, or a JSON
            document in URL-safe base64.
    """
    if config is None:
        return None
    if not isinstance(config, Mapping):
        if os.path.exists(config):
            with open(config) as file:
                config = hjson.load(file)
        else:
            try:
                config = json.loads(base64.urlsafe_b64decode(config))
            except ValueError as error:
                raise ValueError(f"no DeepSpeed configuration at {config!r}") from error
    return config.get(CONFIG_KEY)
