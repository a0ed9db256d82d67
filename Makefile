# `make demo`, `make test` and `make check` set themselves up on a bare machine with Python >= 3.11.
PYTHON ?= python3
BIN = .venv/bin
# Small networks gain nothing from several threads, and processes that share cores lose by spinning.
QUIET = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive

.PHONY: setup demo test slow check lint types format clean

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Potstill needs Python 3.11 or newer; set PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/potstill demo

test: setup
	$(QUIET) $(BIN)/python -m pytest -n auto --dist loadgroup -m 'not slow'

slow: setup
	$(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy

check: lint types test

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache
