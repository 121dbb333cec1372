SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: demo test test-all static lint bench help clean

PYTHON ?= python3
MINUTES ?= 8
OUT ?= runs/demo
ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed
BENCHES := $(filter-out %/__init__.py,$(wildcard tools/bench/[!_]*.py kernels/bench/[!_]*.py))

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

bench: $(STAMP) ## every benchmark, gathered in benchmarks/<date>-<commit>.json
	@test -n "$(BENCHES)" || { echo "no benchmark in tools/bench or kernels/bench"; exit 1; }
	@lines=$$(mktemp); trap 'rm -f $$lines' EXIT; \
	out=benchmarks/$$(date +%F)-$$(git rev-parse --short HEAD).json; mkdir -p benchmarks; \
	for script in $(BENCHES); do echo "$$script"; $(BIN)/python $$script --json | tail -n 1 >> $$lines; done; \
	$(BIN)/python -c 'import json, sys; print(json.dumps({"results": [json.loads(line) for line in sys.stdin]}, indent=1))' \
	    < $$lines > $$out.part; mv $$out.part $$out; echo "$$out"

clean: ## remove caches and the virtual environment; runs/ stays
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev,demo]"
	touch $@
