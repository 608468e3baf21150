#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains the example on $NUM_RANKS ranks (default 2). Arguments go to train_gpt_moe.py.
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/venv.sh examples
exec deepspeed --num_gpus "${NUM_RANKS:-2}" examples/train_gpt_moe.py "$@"
