#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Lints, checks types and tests in a virtual environment of its own ($VENV, default .venv). Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. .ci/venv test,examples
ruff check .
ruff format --check .
basedpyright
exec python -m pytest "$@"
