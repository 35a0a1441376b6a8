# The two commands of the README, and what they need. Each makes .venv where there is none.
PYTHON ?= python3
BIN = .venv/bin
DEFINITION = pyproject.toml constraints/py311.txt constraints/py312.txt
# The constraints for an interpreter: JAX 0.10 on Python 3.11, the current JAX on later ones.
pins = constraints/$(shell $(1) -c 'import sys; print("py312" if sys.version_info >= (3, 12) else "py311")').txt
TOOLS = build cyclonedx-bom hatchling pip-audit uv # of releases, in an environment of their own

.PHONY: train test test-slow test-ahead torture check docs dist smoke sbom audit lowest clean

train: .venv/.installed  ## Train e2SAD and a natural model on the embedded digits, attack both, report.
	@$(BIN)/python -m experiments.digits $(ARGS)

PYTEST = $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

test: .venv/.installed-dev  ## Linter, type checker and unit tests.
	$(MAKE) --no-print-directory check
	$(PYTEST) -m "not slow and not ahead" $(ARGS)

test-slow: .venv/.installed-dev  ## Real trainings, processes, kills, packages.
	$(PYTEST) -m slow $(ARGS)

test-ahead: .venv/.installed-dev build/ahead/.installed  ## The train steps compiled for TPUs and GPUs that are not here.
	PYTHONPATH=build/ahead $(PYTEST) -m ahead $(ARGS)

torture: .venv/.installed-dev  ## Faults done to real runs: kill -9, a full disk, damaged files, ... (as root; at most an hour).
	$(BIN)/python -m benchmarks.faults --results=results/reliability $(ARGS)

check: .venv/.installed-dev  ## Linter and type checker.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/.installed-dev  ## The documentation's site, into site/; a broken link is an error.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict  # not --quiet: it would pass over what strict is for
	@echo "site/index.html"

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python >= 3.11 is needed; this is " + sys.version.split()[0] + ". Choose another: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

.venv/.installed: $(DEFINITION) | .venv/bin/python
	@echo "Installing into .venv (once) ..."
	$(BIN)/pip install --quiet --constraint $(call pins,$(BIN)/python) --editable '.[data,tensorboard]'
	@touch $@

.venv/.installed-dev: $(DEFINITION) | .venv/bin/python
	@echo "Installing with the tools of development into .venv (once) ..."
	$(BIN)/pip install --quiet --constraint $(call pins,$(BIN)/python) --editable '.[data,dev,export,tensorboard]'
	@touch $@ .venv/.installed

build/ahead/.installed: $(DEFINITION) | .venv/.installed-dev
	@echo "Installing the compilers for TPUs and GPUs into build/ahead (once) ..."
	$(BIN)/pip install --quiet --no-deps --constraint $(call pins,$(BIN)/python) --target build/ahead jax-cuda12-pjrt jax-cuda12-plugin libtpu nvidia-cuda-nvcc-cu12
	@touch $@

dist: build/tools/.installed  ## Wheel and source distribution of the last commit, built twice and equal byte for byte, into dist/.
	@benchmarks/dist.sh build/tools/bin/python

smoke: dist  ## Install the wheel into empty environments, for each Python and JAX, and use it there. SMOKE: which Pythons.
	@benchmarks/smoke.sh dist/*.whl $(SMOKE)

sbom: build/user/.installed  ## What an installation with the pinned versions consists of, as CycloneDX, into dist/.
	@mkdir -p dist
	build/tools/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-file dist/e2sad_jax.cdx.json build/user/bin/python

audit: build/tools/.installed  ## Known vulnerabilities of all that constraints/ pins; fails if the service cannot be asked.
	@benchmarks/audit.sh build/tools/bin/pip-audit

lowest: build/tools/.installed  ## Some tests with the lowest versions that pyproject.toml allows.
	@benchmarks/lowest.sh build/tools/bin/uv $(PYTHON)

build/tools/.installed: $(DEFINITION)
	@echo "Installing the tools of releases into build/tools (once) ..."
	$(PYTHON) -m venv --clear build/tools
	build/tools/bin/pip install --quiet --constraint $(call pins,$(PYTHON)) $(TOOLS)
	@touch $@

build/user/.installed: $(DEFINITION) build/tools/.installed
	@echo "Installing as a user does into build/user (once) ..."
	$(PYTHON) -m venv --clear build/user
	build/user/bin/pip install --quiet --constraint $(call pins,$(PYTHON)) .
	build/user/bin/pip uninstall --quiet --yes pip setuptools
	@touch $@

clean:  ## Remove the environment and caches; runs stay.
	rm -rf .venv build dist site .mypy_cache .pytest_cache .ruff_cache *.egg-info
