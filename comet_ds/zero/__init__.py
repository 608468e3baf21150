# SPDX-License-Identifier: Apache-2.0
"""What DeepSpeed's engine and its optimizers do differently for stacked experts.

Face:
    hooks.install_hooks                     wraps the engine's methods when comet_ds is imported
    optimizer_groups.split_expert_groups    gives a user's optimizer the groups that ZeRO requires

``optimizer_choice`` unstacks experts for optimizers that need one parameter per expert,
``engine_layout`` makes checkpoints DeepSpeed's, ``shortcuts``, ``norm`` and ``unsharded`` skip work
that stacks do not need.
"""
