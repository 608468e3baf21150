# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's checkpoint layout: conversion from and to stacks, and files without an engine.

On disk a checkpoint of comet_ds's layer is a DeepSpeed checkpoint.

Face for an engine (``zero/engine_layout.py``):
    layout.ParameterTable, find_clusters    stacked and native parameters, groups of an optimizer
    flat_states.FlatStates                  converts optimizer states of flattened groups
    states.ParameterStates                  converts optimizer states of single parameters
    whole_state.keep_own_experts            loads a state_dict with the experts of all ranks

Face for files (``cli/checkpoint.py``):
    files.Checkpoint                        finds and reads a checkpoint
    consolidate.consolidate                 writes the whole model into one file
    reshard.reshard                         writes a checkpoint for another number of ranks

``names`` numbers experts, ``groups`` and ``entries`` find the parameters in the optimizer's
tensors, ``flat_groups`` lays out flattened groups.
"""
