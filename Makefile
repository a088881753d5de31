# Each target sets up what it needs: a virtual environment with pinned packages.
#   make bench   make test   make lint   make test-oldest
# Options: PYTHON=python3.13, ARGS="--models 60M" (bench) or ARGS="-k swiglu" (test).

VENV ?= .venv
CONSTRAINTS ?= constraints.txt
# An NVIDIA driver asks for JAX's CUDA packages too; EXTRAS=bench,dev leaves them out.
EXTRAS ?= bench,dev$(if $(shell command -v nvidia-smi),$(comma)cuda)
comma := ,
ARGS ?=

CANDIDATES := python3 python3.12 python3.13 python3.14 python
IS_NEW := import sys; sys.exit(sys.version_info < (3, 12))
PYTHON ?= $(firstword $(foreach p,$(CANDIDATES),$(shell $(p) -c '$(IS_NEW)' >/dev/null 2>&1 && echo $(p))))
BIN := $(VENV)/bin
READY := $(VENV)/.installed

.PHONY: bench test lint test-oldest format
.DELETE_ON_ERROR:

bench: $(READY)
	$(BIN)/python -m benchmarks.mlp $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The other end of the range of versions that pyproject.toml promises.
test-oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

$(READY): pyproject.toml $(CONSTRAINTS)
	@test -n "$(PYTHON)" || { \
	  echo "jaxkern needs Python 3.12 or newer, and there is none on the PATH." >&2; \
	  echo "Looked for: $(CANDIDATES)." >&2; \
	  echo "Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint $(CONSTRAINTS) --editable '.[$(EXTRAS)]'
	@touch $@
