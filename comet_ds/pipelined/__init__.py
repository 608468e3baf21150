# SPDX-License-Identifier: Apache-2.0
"""The pipelined path: dispatch, experts and combine, chunk by chunk, over any process group.

Face, in the order of a forward:
    grouped_mlp.ExpertRunner        runs the local experts, by grouped GEMM or module by module
    chunks.ChunkChoice              chooses the number of chunks, gives the schedule
    plan.plan_routes                orders the routes into rows
    counts.CountExchange            tells every rank the row counts of all ranks
    forward.pipelined_forward       dispatches, computes and combines; defines the backward
    row_ops.describe                names the row operations for the log line
"""
