# make reproduce   set up, run every notebook on the shipped models, write figures/
# make test        set up, lint, run the tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := $(shell grep -o '^torch==[^ ;]*' requirements.lock)
# Without an NVIDIA driver torch comes from PyTorch's CPU index: the build on PyPI for Linux would pull gigabytes of CUDA.
# The lock is complete, so it is installed with --no-deps too: else pip would go and fetch what an installed torch asks for.
ifeq ($(shell command -v nvidia-smi 2>/dev/null),)
TORCH_OPTIONS := --no-deps --extra-index-url https://download.pytorch.org/whl/cpu --retries 1 --timeout 15
endif

.PHONY: reproduce test lint setup clean

reproduce: setup
	$(BIN)/python -m lib run --profile cpu $(ARGS)

test: lint
	$(BIN)/python -m pytest $(ARGS)

lint: setup
	$(BIN)/ruff check .

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "Python 3.11 to 3.13 is needed, $(PYTHON) is $$($(PYTHON) --version); use make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(TORCH) $(TORCH_OPTIONS)
	$(BIN)/python -m pip install --no-deps -r requirements.lock
	$(BIN)/python -m pip install --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf $(VENV) runs
