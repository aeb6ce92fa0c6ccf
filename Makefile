# The README's two commands are `make demo` and `make test`; both make .venv first if it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Exact versions, so that a result here is a result anywhere. EulerStack pins an older torch than it needs, so it is
# installed without its dependencies; what it imports is in the `dev` extra.
EULERSTACK := eulerstack==0.1.3

.PHONY: demo test check matrix chaos bench install clean
install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(EULERSTACK)
	touch $@

demo: install
	$(BIN)/eulerforge quickstart

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py

test: check
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

matrix: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m matrix tests/distributed

# Kills and signals at random moments; half an hour.
chaos: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.chaos kills --count 40 --strategy ddp
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.chaos kills --count 40 --strategy fsdp
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.chaos signals --count 20

bench: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,bench]'
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache
