# SPDX-License-Identifier: Apache-2.0
"""The optional "comet_ds" block of the DeepSpeed JSON."""

from __future__ import annotations

import base64
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import hjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

CONFIG_KEY = "comet_ds"


# Options that all layers of an expert parallel group share; the rest may differ between layers.
GROUP_OPTIONS = ("timeout_s", "tuning_table", "refine")
# Options of the training engine; a layer does not use them.
ENGINE_OPTIONS = ("metrics", "metrics_interval", "timeline_step")


class CometConfig(BaseModel):
    """Options of comet_ds; every one has a default that suits most runs.

    Attributes:
        path: of a layer; "auto" takes the best path that can run; "reference", "pipelined" or
            "fused" pins one.
        num_chunks: of a layer; chunks its rows are cut into to overlap communication with
            computation; "auto" takes 1 where nothing is communicated (path "pipelined").
        exact_gate: of a layer; compute gate logits with DeepSpeed's own operation everywhere; see
            ``TopKGate``.
        grouped_gemm: of a layer; use torch's grouped GEMM where it applies (path "pipelined").
        stack_experts: of a layer; keep each matrix of all local experts in one parameter
            (comet_ds/experts/stacked.py); false keeps one parameter per expert, as DeepSpeed does.
            A layer that was built with false stays so.
        max_rows_factor: of a layer; the largest number of rows that a rank computes without
            dropping, as a multiple of the even share of all ranks' routes (path "fused", ep_size
            above 1). Memory is reserved for them, a routing that exceeds them is an error, and CUDA
            graphs can capture the layer. None reads the number of rows on the host in every forward
            and allocates what they need.
        timeout_s: of a group; seconds to wait for another rank before the error that names it.
            What only the device waits for (NCCL's all-to-alls, path "pipelined") has the process
            group's timeout.
        tuning_table: of a group; file of ``comet_ds tune``; None takes the user's (path "fused").
        refine: of a group; in a run's first forwards, measure CTA splits of layers that the table
            does not have, keep the fastest and add them to the table (path "fused").
        metrics: of the engine; write metrics to DeepSpeed's monitor when one is enabled.
        metrics_interval: of the engine; steps between two writes; None takes DeepSpeed's
            steps_per_print.
        timeline_step: of the engine; step in which the first layer's timeline is recorded (path
            "fused"), with kernels that are compiled for it; None records nothing.
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
        """Validate a block of the DeepSpeed JSON.

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

    @classmethod
    def parse_layer(cls, options: Mapping[str, Any] | CometConfig | None) -> CometConfig:
        """Validate options given to a layer.

        Raises:
            ValueError: as ``parse``, and naming the engine's options, which a layer would ignore.
        """
        config = cls.parse(options)
        if found := [name for name in ENGINE_OPTIONS if name in config.model_fields_set]:
            raise ValueError(
                f'"{CONFIG_KEY}": {", ".join(found)} of the engine cannot be set for a layer: put '
                f'it into the "{CONFIG_KEY}" block of the DeepSpeed JSON'
            )
        return config

    def layer_options(self) -> dict[str, Any]:
        """Return the options that were set, except the engine's."""
        return self.model_dump(include=self.model_fields_set - set(ENGINE_OPTIONS))

    def merge(self, block: CometConfig) -> CometConfig:
        """Return these options of a layer, with those that ``block`` sets in their place."""
        return self.model_copy(update=block.layer_options())


def check_group_options(configs: Mapping[str, Sequence[CometConfig]]) -> None:
    """Check that the layers of each expert parallel group have the same options of a group.

    Args:
        configs: options of the layers, by name of their group.

    Raises:
        ValueError: naming the first option that differs, and two of its values.
    """
    for (group, found), name in itertools.product(configs.items(), GROUP_OPTIONS):
        values = [getattr(config, name) for config in found]
        if others := [value for value in values if value != values[0]]:
            raise ValueError(
                f'"{CONFIG_KEY}": {name} must be the same for all layers of an expert parallel '
                f"group ({group}), got {values[0]!r} and {others[0]!r}"
            )


def read_block(config: Any) -> Mapping[str, Any] | None:
    """Return the "comet_ds" block of a DeepSpeed configuration, None where there is none.

    Args:
        config: what ``deepspeed.initialize`` accepts: a dict, the path of a JSON file, or a JSON
            document in URL-safe base64; or None.

    Raises:
        ValueError: it is none of these.
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
