#!/usr/bin/env bash
# Are the lower bounds in pyproject.toml true? Installs the lowest versions that they allow and runs some tests there.
#
#   benchmarks/lowest.sh UV PYTHON
#
# Needs the package index. What was installed stands in build/lowest.txt.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p build
"$1" pip compile --quiet --no-header --python "$2" --resolution lowest-direct --extra data --extra export --extra tensorboard \
    --output-file build/lowest.txt pyproject.toml
"$1" venv --quiet --clear --python "$2" build/lowest
"$1" pip install --quiet --python build/lowest/bin/python --requirement build/lowest.txt pytest chex
# Old releases warn of what was to come; that is not about our calls.
build/lowest/bin/python -m pytest -o filterwarnings= -p no:cacheprovider tests/unit/runs/test_checkpoint.py \
    tests/unit/data/test_data_prepare.py tests/unit/test_export.py tests/unit/networks/test_cnn.py
