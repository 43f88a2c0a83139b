# make demo     run a whole federation on this machine and write a report
# make test     every test;  make check: lint, types, import rules;  make bench: ratios, side by side
#
# The first target that needs it makes .venv from requirements.lock. PYTHON= names the interpreter (3.11),
# SITES="dir dir dir" gives the demo your own BIDS folders, OUT= says where it writes. Folders with a space in their name:
# .venv/bin/central demo --site "one folder" --site "another folder".

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test check bench proto clean install

PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
VENV ?= .venv
BIN := $(VENV)/bin
override READY := $(VENV)/.ready
OUT ?= runs/demo
SITES ?=
PYTEST_ARGS ?=

export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1

help: ## Show the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 16

install: $(READY) ## Make .venv from requirements.lock

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v == (3, 11) else f"the lock file is for Python 3.11, {sys.executable} is {v[0]}.{v[1]}. Next: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11")'
	@if [ -d "$(VENV)" ] && [ -n "$$(ls -A "$(VENV)")" ] && [ ! -f "$(VENV)/pyvenv.cfg" ]; then \
	  echo "$(VENV) is not empty and no virtual environment; nothing was touched. Next: name another, VENV=folder." >&2; exit 2; fi
	@echo "First use, or the lock has changed: making $(VENV) from requirements.lock (some minutes)"
	@$(PYTHON) -m venv "$(VENV)"
	@echo "  1/3 pinned and hashed packages ..."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --require-hashes --no-deps -r requirements.lock
	@echo "  2/3 torch ..."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check torch==2.13.0
	@echo "  3/3 this project ..."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
	@echo "  ready"

demo: $(READY) ## A coordinator and three hospitals on this machine: runs/demo/report.html
	@$(BIN)/central demo --out "$(OUT)" $(foreach site,$(SITES),--site "$(site)")

test: $(READY) ## Every test that needs no GPU
	@$(BIN)/python -m pytest -m "not gpu" $(PYTEST_ARGS)

check: $(READY) ## Lint, format, types, import rules
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: $(READY) ## Ratios measured side by side in one run
	@$(BIN)/python -m tests.bench

proto: $(READY) ## Generate the gateway's messages from their .proto file
	@$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. sspformer/contract/gateway.proto

clean: ## Remove the virtual environment, caches and runs/demo
	@rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache runs/demo
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
