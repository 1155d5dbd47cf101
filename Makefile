# The commands of the README. Each sets up .venv on a fresh clone and needs nothing but Python >= 3.11.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: install demo test test-faults test-long lint benchmarks clean

install: $(READY)  ## Set up .venv with the tested versions, without running anything.

demo: $(READY)  ## Compare training alone, one shared LoRA, FedAMoLE and its variant on the bundled task.
	$(BIN)/fedamole demo

test: $(READY) lint  ## Style, types and all tests.
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-faults: $(READY)  ## The slow tests: a deployment's faults, with real processes.
	$(BIN)/python -m pytest -m faults

test-long: $(READY)  ## The tests of more than 20 seconds: benchmarks that start many processes.
	$(BIN)/python -m pytest -m long

benchmarks: $(READY)  ## Measure every table of docs/performance.md again, into benchmarks/results; goes on where it stopped.
	$(BIN)/python benchmarks/all.py

lint: $(READY)  ## Style and types of everything that is Python.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build src/*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(READY)
