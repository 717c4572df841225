# Each target does its own set-up in .venv from a fresh clone.
#   make demo ARGS="--minutes 5"     make test     make install     make lint     make clean
# PYTHON chooses the interpreter that makes .venv; PIP_ARGS goes to pip.

PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
BIN := .venv/bin
DECLARED := pyproject.toml setup.py constraints.txt

.PHONY: install demo test lint clean
.DELETE_ON_ERROR:

install: .venv/.core

demo: .venv/.core
	@$(BIN)/arra demo $(ARGS)

test: lint
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q $(ARGS)

lint: .venv/.dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

clean:
	rm -rf .venv build dist arra.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "arra needs Python 3.11 or newer, found: $$($(PYTHON) --version 2>&1); try: make PYTHON=/path/to/python3.11 install" >&2; exit 1; }
	@$(PYTHON) -m venv .venv

# What running needs.
.venv/.core: $(DECLARED) | .venv/bin/python
	@echo "installing arra into .venv (minutes the first time)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e .
	@touch $@

# What testing needs: the same and the tools, so .core is fresh afterwards too.
.venv/.dev: $(DECLARED) | .venv/bin/python
	@echo "installing arra and its development tools into .venv (minutes the first time)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[dev]"
	@touch .venv/.core $@
