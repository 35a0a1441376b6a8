#!/usr/bin/env bash
# Are the lower bounds in pyproject.toml true? Installs the lowest versions that they allow and runs some tests there.
#
#   benchmarks/lowest.sh UV PYTHON
#
# Needs the package index. What was installed stands in build/lowest.txt.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p build
"$1" pip compile --quiet --python "$2" --resolution lowest-direct --all-extras --no-emit-package e2sad_jax \
    --output-file build/lowest.txt pyproject.toml
"$1" venv --quiet --clear --python "$2" build/lowest
"$1" pip install --quiet --python build/lowest/bin/python --requirement build/lowest.txt
