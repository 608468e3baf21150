#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains the example on $NUM_RANKS ranks (default: 2, or 1 on a machine with one GPU). Passes its
# arguments to train_gpt_moe.py.
set -euo pipefail
cd "$(dirname "$0")/.."
. .ci/venv examples
num_gpus=$(python -c "import torch; print(torch.cuda.device_count())")
exec deepspeed --num_gpus "${NUM_RANKS:-$((num_gpus == 1 ? 1 : 2))}" examples/train_gpt_moe.py "$@"
