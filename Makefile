# The project's commands; `make help` lists them.
# PYTHON: the interpreter that .venv is made from (3.11 or newer).  make demo PYTHON=/path/to/python3.12
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
BIN := .venv/bin
OUT ?= demo

TEST_WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo install dev test exhaustive check format schema kit clean

help:  ## list the commands
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

demo: install  ## train both stages on the embedded default, two to five minutes on two CPU cores
	$(BIN)/fastllava demo --out $(OUT)
	@echo "The report is $(OUT)/report.html; everything the run left lies in $(OUT)/"

install: .venv/installed  ## make .venv and install fastllava into it

dev: .venv/installed-dev  ## the same, with what the tests and checks need

# The tests' tensors are small: two processes of one thread each are faster than one process of two threads.
test: dev  ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(TEST_WORKERS) --dist worksteal -m "not exhaustive"

exhaustive: dev  ## run the tests that try whole matrices of cases
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(TEST_WORKERS) --dist worksteal -m exhaustive

check: dev  ## lint, format, types, import floors, spelling, kernels compiled for A100 and H100, schema
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/python -m fastllava_kernels._tuning.aot --check kernels/aot.md
	@$(BIN)/python -m fastllava.config.schema .venv/schema.json
	@cmp .venv/schema.json configs/schema.json || { echo "configs/schema.json is out of date: run make schema"; exit 1; }
	@$(BIN)/python -m fastllava.mix.schema .venv/mix-schema.json
	@cmp .venv/mix-schema.json configs/mix-schema.json || { echo "configs/mix-schema.json is out of date: run make schema"; exit 1; }
	@$(BIN)/python -m fastllava.config.reference .venv/keys.md
	@cmp .venv/keys.md docs/keys.md || { echo "docs/keys.md is out of date: run make schema"; exit 1; }

format: dev  ## format the code and mend what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schema: install  ## write the schemas in configs/ and docs/keys.md anew
	$(BIN)/python -m fastllava.config.schema configs/schema.json
	$(BIN)/python -m fastllava.mix.schema configs/mix-schema.json
	$(BIN)/python -m fastllava.config.reference docs/keys.md

# For Python 3.12 on x86-64. pip of .venv downloads them; nothing is installed.
kit: | .venv/bin/pip  ## gather into wheels/ what a GPU machine without a network lacks, PyTorch aside
	$(BIN)/python -P benches/kit.py --out wheels

clean:  ## remove .venv, caches and ./demo
	rm -rf .venv demo build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are older than pyproject.toml when what is to be installed may have changed.
.venv/bin/pip:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "fastllava needs Python 3.11 or newer, and '$(PYTHON)' is not: make demo PYTHON=/path/to/python3.11"; exit 1; }
	"$(PYTHON)" -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/pip
	@echo "Installing fastllava and what it needs into .venv; PyTorch is large, so the first time takes minutes"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

.venv/installed-dev: pyproject.toml | .venv/bin/pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@ .venv/installed
