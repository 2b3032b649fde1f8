# Every target does the set-up that it needs; a machine with make and Python 3.11 or newer will do.
VENV ?= .venv
PYTHON ?= python3
BACKEND ?= cpu
PYTEST_ARGS ?=
# Tests that run at once: an engine in a test process computes on one core.
WORKERS ?= 2

BIN := $(VENV)/bin
# All tests of a file go to one worker, which so builds the file's engine once.
PARALLEL := -n $(WORKERS) --dist loadfile
# Newer than what it depends on: the environment is up to date, and `make setup` has nothing to do.
READY := $(VENV)/.ready-$(BACKEND)

.PHONY: help setup model demo test test-fast test-gpu bench-gpu lint clean distclean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## make the virtual environment: vLLM, this project, the tools

$(READY): setup.py scripts/setup.sh $(wildcard packaging/*/*.py)
	VENV=$(VENV) PYTHON=$(PYTHON) BACKEND=$(BACKEND) scripts/setup.sh
	@touch $@

model: $(READY)  ## make .models/SmolLM2-135M-Instruct
	@$(BIN)/python -m benchmarks.models

demo: $(READY) model  ## see it work on the small model
	$(BIN)/python -m benchmarks.demo

test: $(READY) model  ## all tests; the slow ones run a real model and start servers
	$(BIN)/python -m pytest $(PARALLEL) $(PYTEST_ARGS)

test-fast: $(READY)  ## the tests that need neither
	$(BIN)/python -m pytest -m "not slow" $(PARALLEL) $(PYTEST_ARGS)

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

clean:  ## remove builds and caches; keep the environment and the models
	rm -rf build dist *.egg-info packaging/*/build packaging/*/*.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean  ## remove these too
	rm -rf $(VENV) .models .demo
