# Every target does the set-up that it needs; a machine with make and Python 3.11 or newer will do.
VENV ?= .venv
PYTHON ?= python3
BACKEND ?= cpu
# Which release, with BACKEND=cuda; empty: the newest that is supported.
VLLM ?=
PYTEST_ARGS ?=
# Tests that run at once: an engine in a test process computes on one core.
WORKERS ?= 2

BIN := $(VENV)/bin
# All tests of a file go to one worker, which so builds the file's engine once. In their order: by number, a file whose one
# test takes minutes would come last, and the other worker wait for it.
PARALLEL := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# The environment of `smoke`.
SMOKE ?= .smoke
# Newer than what it depends on: the environment is up to date, and `make setup` has nothing to do.
READY := $(VENV)/.ready-$(BACKEND)$(VLLM)

.PHONY: help setup model demo test test-fast test-release test-nightly test-gpu bench-gpu coverage lint dist smoke clean distclean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## make the virtual environment: vLLM, this project, the tools

$(READY): setup.py scripts/setup.sh $(wildcard packaging/*/*.py)
	VENV=$(VENV) PYTHON=$(PYTHON) BACKEND=$(BACKEND) VLLM=$(VLLM) scripts/setup.sh
	@touch $@

model: $(READY)  ## make .models/SmolLM2-135M-Instruct
	@$(BIN)/python -m benchmarks.models

demo: $(READY) model  ## see it work on the small model
	$(BIN)/python -m benchmarks.demo

test: $(READY) model  ## all tests; the slow ones run a real model and start servers
	$(BIN)/python -m pytest $(PARALLEL) $(PYTEST_ARGS)

test-fast: $(READY)  ## the tests of three minutes: arithmetic, policies, kernels interpreted, a few engines
	$(BIN)/python -m pytest -m "not slow" $(PARALLEL) $(PYTEST_ARGS)

test-release: $(READY)  ## the engine tests on a pretended GPU with one release of vLLM (VLLM_CUDA=0.33.0)
	VLLM_CUDA=$(VLLM_CUDA) $(BIN)/python -m pytest tests/cuda $(PYTEST_ARGS)

test-nightly: $(READY)  ## what `test` leaves for the night: every release of vLLM, every variant of a kernel, a storm
	$(BIN)/python -m pytest -m nightly $(PARALLEL) $(PYTEST_ARGS)

coverage: $(READY)  ## the share of lines that test-fast runs
	$(BIN)/python -m pytest -m "not slow" --cov --cov-report=term $(PARALLEL) $(PYTEST_ARGS)

test-gpu: $(READY)  ## kernels and engine on this machine's GPU (BACKEND=cuda)
	KERNELS_DEVICE=cuda $(BIN)/python -m pytest tests/kernels $(PYTEST_ARGS)
	CUDA_TESTS=gpu $(BIN)/python -m pytest tests/cuda $(PYTEST_ARGS)

bench-gpu: $(READY)  ## each kernel beside what the GPU can do (BACKEND=cuda)
	$(BIN)/python -m benchmarks.kernels

lint: $(READY)  ## ruff, mypy and hadolint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint docker/Dockerfile docker/Dockerfile.cpu

dist: $(READY)  ## sdist and wheel; one distribution has both packages
	rm -rf build dist
	$(BIN)/python -m build

smoke: dist  ## that wheel in a fresh environment: flag, planner, an eviction
	rm -rf $(SMOKE)
	VENV=$(SMOKE) PYTHON=$(PYTHON) TOOLS=0 PROJECT=$$(ls dist/*.whl) scripts/setup.sh
	$(SMOKE)/bin/python -I scripts/smoke.py

clean:  ## remove builds and caches; keep the environment and the models
	rm -rf build dist *.egg-info packaging/*/build packaging/*/*.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -not -path './$(SMOKE)/*' -prune -exec rm -rf {} +

distclean: clean  ## remove these too
	rm -rf $(VENV) $(SMOKE) .models .demo
