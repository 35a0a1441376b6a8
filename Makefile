# The two commands of the README, and what they need. Each makes .venv where there is none.
PYTHON ?= python3
BIN = .venv/bin
DEFINITION = pyproject.toml constraints.txt

.PHONY: train test torture check clean

train: .venv/.installed  ## Train e2SAD and a natural model on the embedded digits, attack both, report.
	@$(BIN)/python -m experiments.digits $(ARGS)

test: .venv/.installed-dev  ## Linter, type checker and tests.
	$(MAKE) --no-print-directory check
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder $(ARGS)

torture: .venv/.installed-dev  ## Faults done to real runs: kill -9, a full disk, damaged files, ... (as root; 20 minutes).
	$(BIN)/python -m tests.torture --results=results $(ARGS)

check: .venv/.installed-dev  ## Linter and type checker.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python >= 3.11 is needed; this is " + sys.version.split()[0] + ". Choose another: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

.venv/.installed: $(DEFINITION) | .venv/bin/python
	@echo "Installing into .venv (once) ..."
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	@touch $@

.venv/.installed-dev: $(DEFINITION) | .venv/bin/python
	@echo "Installing with the tools of development into .venv (once) ..."
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@ .venv/.installed

clean:  ## Remove the environment and caches; runs stay.
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache *.egg-info
