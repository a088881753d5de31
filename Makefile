# Each target sets up what it needs: a virtual environment with pinned packages.
#   make bench          run a benchmark's default         NAME=flash_mlp ARGS="--list"
#   make test           run the tests                     ARGS="-k swiglu"
#                       CASES=all for further cases of the same kinds of faults
#   make lint           check format, style and types
#   make format         put format and style right
#   make kernels        compile the GPU kernels that changed, without a GPU; ARGS=--all
#                       for every one
#   make package        build the wheel and the sdist, and try the wheel alone
#   make docs           build the documentation site into site/, strictly
#   make docs-serve     show the site while it is written
#   make pictures       draw the block masks of docs/guides/block-masks.md
#   make mutants        see whether tests find faults     ARGS="--only zigzag-order"
#   make test-oldest    test with the oldest packages that pyproject.toml allows: each
#                       public name once; CASES=all for every test but rows
# PYTHON=python3.13 names another Python.

VENV ?= .venv
CONSTRAINTS ?= constraints.txt
# An NVIDIA driver asks for JAX's CUDA packages too; EXTRAS=bench,dev,docs leaves them out.
EXTRAS ?= bench,dev,docs$(if $(shell command -v nvidia-smi),$(comma)cuda13)
comma := ,
ARGS ?=
NAME ?= mlp

CANDIDATES := python3 python3.12 python3.13 python3.14 python
IS_NEW := import sys; sys.exit(sys.version_info < (3, 12))
is_new = $(shell $(1) -c '$(IS_NEW)' >/dev/null 2>&1 && echo $(1))
PYTHON ?= $(firstword $(foreach p,$(CANDIDATES),$(call is_new,$(p))))
# Compiled modules halve the time until the first test starts.
unexport PYTHONDONTWRITEBYTECODE
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Apart from the environment and from Python's path. Without this, every program on a
# machine without a GPU would find the CUDA plugin in it, and print an error.
CUDA := .cuda
READY := $(VENV)/.installed
# Without either file in it, the folder is the user's, and stays as it is.
OURS := $(VENV)/.made-by-make

.PHONY: help bench test lint test-oldest format kernels docs docs-serve pictures package mutants
.DELETE_ON_ERROR:

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

bench: $(READY)
	$(BIN)/python -m benchmarks.$(NAME) $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n auto --maxprocesses 8 $(if $(filter all,$(CASES)),-m "not gpu") $(ARGS)

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/basedpyright
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

kernels: $(READY) $(CUDA)/.installed
	JAXKERN_COMPILER=$(CUDA) $(BIN)/python -m benchmarks.kernels $(ARGS)

# The wheel is made from the sdist, so both are known to be whole. It runs without the
# packages of any extra, away from the clone; twine comes only after that.
ALONE := .venv-package
package: $(READY)
	rm -rf dist
	$(BIN)/hatchling build --target sdist
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps \
	  --no-build-isolation --wheel-dir dist dist/*.tar.gz
	$(PYTHON) -m venv --clear $(ALONE)
	$(ALONE)/bin/python -m pip install --quiet --disable-pip-version-check dist/*.whl
	$(ALONE)/bin/python -m pip check
	cd $(ALONE) && bin/python -W error ../examples/quickstart.py
	cd $(ALONE) && bin/python -W error -m jaxkern.benchmarks.mlp --list
	$(ALONE)/bin/python -m pip install --quiet --disable-pip-version-check twine
	$(ALONE)/bin/twine check --strict dist/*

docs: $(READY) pictures
	$(BIN)/python docs/build.py

docs-serve: $(READY)
	$(BIN)/python docs/build.py --serve

# They are drawn from the code of the page that shows them.
pictures: $(READY)
	$(BIN)/python docs/pictures.py

# For who changes tests; too long for every change.
mutants: $(READY)
	$(BIN)/python tests/mutants/run.py $(ARGS)

# The other end of the range of versions that pyproject.toml promises.
SMOKE := tests/test_smoke.py
test-oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt EXTRAS=bench,dev \
	  ARGS='-m "not gpu and not newest" $(if $(filter all,$(CASES)),,$(SMOKE)) $(ARGS)'

$(READY): pyproject.toml $(CONSTRAINTS)
	@test -n "$(call is_new,$(PYTHON))" || { \
	  echo "jaxkern needs Python 3.12 or newer." >&2; \
	  echo "Looked for: $(if $(PYTHON),$(PYTHON),$(CANDIDATES))." >&2; \
	  echo "Install one, or name it: make PYTHON=/path/to/python3.12 ..." >&2; \
	  exit 1; }
	@test ! -e $(VENV) || test -e $(OURS) || test -e $(READY) || { \
	  echo "$(VENV) exists, and make did not make it." >&2; \
	  echo "Move it away, or name another folder: make VENV=.venv-make ..." >&2; \
	  exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $(OURS)
	$(PIP) --no-deps --require-hashes --requirement $(CONSTRAINTS)
	@# A clone has no hash. Without --no-index, what $(CONSTRAINTS) lacks would be
	@# installed unpinned; JAX's CUDA packages are, since only a GPU needs them.
	$(PIP) $(if $(findstring cuda,$(EXTRAS)),,--no-index) --no-build-isolation \
	  --editable '.[$(EXTRAS)]'
	@touch $@

$(CUDA)/.installed: requirements-kernels.txt $(READY)
	rm -rf $(CUDA)
	$(PIP) --no-deps --require-hashes --target $(CUDA) \
	  --requirement requirements-kernels.txt
	@touch $@
