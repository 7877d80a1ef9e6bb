# Everything runs in .venv, which each target makes, or brings up to date, where needed.
SHELL := bash
BIN := .venv/bin
PYTEST ?= $(BIN)/pytest
ARGS ?=
export PYTHON

.DEFAULT_GOAL := help
.PHONY: help venv docs demo plan-scale screenshots bench bench-gpu test test-slow test-vllm test-gpu test-integrations test-chaos soak pytest lint format wheel constraints clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: ## make .venv (PYTHON=python3.12 picks the interpreter)
	@scripts/setup.sh

demo: venv ## push new weights into a real, running vLLM (ARGS="--engine torch" for the small engine)
	$(BIN)/weightsync demo $(ARGS)

plan-scale: venv ## plan a model of a trillion parameters, and show how planning time grows
	$(BIN)/weightsync plan --model-config docs/examples/moe-1t.config.json \
	  --trainer fsdp=256,ep=8 --inference tp=8,dp=16,ep=8 --scaling $(ARGS)

screenshots: venv ## take the pictures of the status page (needs Chromium)
	$(BIN)/python scripts/screenshots.py

bench: venv ## measure pushes on this machine's CPU beside their baselines, and planning
	$(BIN)/weightsync bench loopback $(ARGS)
	$(BIN)/weightsync bench plan

bench-gpu: ## measure pushes between CUDA GPUs into vLLM, with the python that is there (PYTHON=python3)
	PYTHONPATH=.:server:client:$$PYTHONPATH $(or $(PYTHON),python3) -m weightsync_client bench gpu $(ARGS)

test: lint pytest ## lint, types, import contracts, and the tests that CI runs

pytest: venv ## the tests alone (ARGS="tests/agent -k pause")
	$(PYTEST) $(ARGS)

test-vllm: venv ## the tests that start a real vLLM (minutes)
	$(PYTEST) -m "vllm and not slow" $(ARGS)

test-integrations: venv ## the tests of docs/integrations.md, with TRL, verl, Ray and UCXX beside .venv
	@scripts/integrations.sh
	.venv-integrations/bin/python -m pytest -m integrations $(ARGS)

test-slow: venv ## the tests that are too slow for CI, vLLM's among them (many minutes)
	$(PYTEST) -m slow $(ARGS)

test-chaos: venv ## the fault suite: real processes killed, stopped, cut off (many minutes)
	$(PYTEST) -m chaos $(ARGS)

soak: venv ## hundreds of pushes with random faults; prints what grew (ARGS="--pushes 500 --seed 1")
	PYTHONPATH=.:server:client $(BIN)/python -m tests.chaos.soak $(ARGS)

test-gpu: ## the tests that need CUDA GPUs, with the python that is there (PYTHON=python3)
	PYTHONPATH=.:server:client:$$PYTHONPATH $(or $(PYTHON),python3) -m pytest -m gpu $(ARGS)

lint: venv ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: venv ## sort imports, apply safe fixes, format
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

docs: venv ## build the documentation site into build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel: venv ## build the wheel into dist/
	$(BIN)/python -m build --wheel --no-isolation

constraints: venv ## pin what .venv holds now
	{ sed -n '/^#/p' requirements/constraints.txt; \
	  $(BIN)/python -m pip list --format=freeze --exclude-editable | sed 's/+.*//'; } \
	  > requirements/constraints.new
	mv requirements/constraints.new requirements/constraints.txt

clean: ## remove builds and caches (.venv stays)
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .demo
