# Each target does its own set-up in .venv from a fresh clone.
#   make demo ARGS="--minutes 5"     make test     make install     make lint     make clean
# PYTHON chooses the interpreter that makes .venv; PIP_ARGS goes to pip; DISK_GB is what must be free before installing.

PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
BIN := .venv/bin
DECLARED := pyproject.toml setup.py constraints.txt

# Measured on Linux with the CUDA build of torch: torch is 5.5 GB in .venv, and its wheels are 3 GB while they are unpacked;
# with the rest .venv comes to 7.4 GB. torch goes first, so that its wheels are gone by then. pip's cache keeps 3.5 GB more.
DISK_GB ?= $(if $(findstring --no-cache-dir,$(PIP_ARGS)),9,13)
define pip_install
@set -e; export TMPDIR="$(CURDIR)/.venv/tmp" PIP_DISABLE_PIP_VERSION_CHECK=1; rm -rf "$$TMPDIR"; \
	held=$$(du -sk .venv | cut -f1); \
	free=$$(df -Pk .venv | awk 'NR == 2 {print $$4}'); \
	missing=$$(($(DISK_GB) * 1000000 - held - free)); \
	if [ $$missing -gt 0 ]; then \
		echo "$(CURDIR)/.venv: installing needs $(DISK_GB) GB in all, $$((missing / 1000 + 1)) MB more than are free;" \
			"free them, or say 'make DISK_GB=N' if your build of torch is smaller" >&2; exit 1; fi; \
	trap 'rm -rf "$$TMPDIR"' EXIT; mkdir -p "$$TMPDIR"; \
	for what in torch $(1); do $(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt $$what; done
endef

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
	$(call pip_install,-e.)
	@touch $@

# What testing needs: the same and the tools, so .core is fresh afterwards too.
.venv/.dev: $(DECLARED) | .venv/bin/python
	@echo "installing arra and its development tools into .venv (minutes the first time)"
	$(call pip_install,"-e.[dev]")
	@touch .venv/.core $@
