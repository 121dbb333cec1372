SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: demo test test-all static lint bench bench-full help clean

PYTHON ?= python3
MINUTES ?= 8
OUT ?= runs/demo
ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12
	@echo
	@echo "Variables: MINUTES=$(MINUTES) OUT=$(OUT) ARGS='--seed 1' (demo), PYTHON=$(PYTHON) (3.11 or newer)"

demo: $(STAMP) ## data, training, evaluation, pictures and report.html in OUT
	$(BIN)/mm demo --minutes $(MINUTES) --out $(OUT) $(ARGS)

test: lint ## lint and the fast tests
	$(BIN)/python -m pytest -q $(ARGS)

test-all: lint ## lint and every test, slow ones too; as root, installs Slurm for its test
	MM_INSTALL_SLURM=1 $(BIN)/python -m pytest -q -m "slow or not slow" $(ARGS)

static: $(STAMP) ## shipped kernels compiled for four GPU architectures, no GPU needed; ARGS=--update commits figures
	$(BIN)/python kernels/static $(ARGS)

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(STAMP) ## side by side with open_clip and diffusers, about half an hour: benchmarks/<date>-<commit>.json
	$(BIN)/python tools/bench $(ARGS)

bench-full: $(STAMP) ## the same, several seeds of samples to an accuracy, and how cost grows: about two hours
	$(BIN)/python tools/bench --full $(ARGS)

clean: ## remove caches and the virtual environment; runs/ stays
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev,demo]"
	touch $@
