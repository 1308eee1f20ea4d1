# Every target does its own set-up in a virtual environment and does it once.
#
#   make demo                            the main job: two ranks, with and without symmpatterns
#   make test  ARGS="-k hook"            the tests
#   make demo PYTHON=python3 VENV=       with the torch that this python3 has; installs nothing
#   make test TORCH=2.11                 with another torch, in an environment of its own

PYTHON ?= python3
TORCH ?= 2.13
VENV ?= $(if $(filter 2.13,$(TORCH)),.venv,.venv-torch-$(TORCH))
# Made for torch 2.11 and for torch 2.13.
VLLM ?= $(if $(filter 2.11,$(TORCH)),0.25.1,0.32.0)
ARGS ?=
RANKS ?= 2
# Test processes at once; the classes of the tests are shared out between them.
JOBS ?= 2
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

ifeq ($(VENV),)
PY := $(PYTHON)
SETUP :=
NATIVE :=
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
PY := $(VENV)/bin/python
SETUP := $(VENV)/.installed
NATIVE := $(VENV)/.host-backend
endif

.PHONY: help demo doctor test test-all test-models test-vllm lint format bench test-matrix hooks clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(NATIVE) ## the main job: a tensor-parallel MLP on two ranks, with and without symmpatterns
	$(PY) -m symmpatterns demo $(ARGS)

doctor: $(SETUP) ## what works on this machine and what does not
	$(PY) -m symmpatterns doctor $(ARGS)

test: $(NATIVE) ## the tests; ARGS="-k hook" picks some
	$(PY) -m pytest -q -n $(JOBS) --dist loadscope -m "not slow" $(ARGS)

test-all: $(NATIVE) ## the tests, the slow ones (soak, wide grids, whole models) too
	$(PY) -m pytest -q -n $(JOBS) --dist loadscope $(ARGS)

test-models: $(NATIVE) ## the tests on Hugging Face transformers' own models; installs transformers
	$(if $(VENV),$(PY) -m pip install -qq --disable-pip-version-check \
	    -c constraints.txt -c constraints-torch-$(TORCH).txt -e '.[models]')
	$(PY) -m pytest -q tests/test_hf_models.py $(ARGS)

test-vllm: $(NATIVE) ## the test with vLLM's own compiler and layers; installs vLLM without its dependencies for GPUs
	$(if $(VENV),$(PY) -m pip install -qq --disable-pip-version-check --no-deps vllm==$(VLLM))
	$(if $(VENV),$(PY) -m pip install -qq --disable-pip-version-check \
	    -c constraints.txt -c constraints-torch-$(TORCH).txt -e '.[test-vllm]')
	$(PY) -m pytest -q tests/test_vllm_itself.py $(ARGS)

lint: $(SETUP) ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(SETUP) ## lets ruff rewrite the sources
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(NATIVE) ## the benchmark; rows and plot go to bench/results; RANKS=2
	$(PY) -m symmpatterns bench --ranks $(RANKS) $(ARGS)

test-matrix: ## the tests on every supported torch, an environment each (downloads gigabytes)
	@failed=; for torch in 2.11 2.13 2.15; do \
	    echo "== torch $$torch"; \
	    $(MAKE) --no-print-directory test-all TORCH=$$torch || failed="$$failed $$torch"; \
	done; test -z "$$failed" || { echo "the tests failed on torch$$failed" >&2; exit 1; }

hooks: $(SETUP) ## lint before every git commit
	$(PY) -m pip install --quiet pre-commit
	$(PY) -m pre_commit install

clean: ## removes environments and caches of this checkout
	rm -rf .venv .venv-torch-* build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

# The stamps make set-up a no-op while nothing it depends on has changed.
$(VENV)/.installed: pyproject.toml constraints.txt constraints-torch-$(TORCH).txt
	@echo "setting up $(VENV) (once; a minute or two, more if torch has to be downloaded)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "symmpatterns needs Python 3.10 or newer, $(PYTHON) is $$($(PYTHON) --version 2>&1); pass PYTHON=..." >&2; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || \
	    { echo "cannot make a virtual environment with $(PYTHON) (on Debian: apt install python3-venv)" >&2; exit 1; }
	$(PY) -m pip install -qq --disable-pip-version-check \
	    -c constraints.txt -c constraints-torch-$(TORCH).txt -e '.[dev]'
	@touch $@

$(VENV)/.host-backend: $(VENV)/.installed $(wildcard symmpatterns/csrc/* symmpatterns/host_*.py)
	$(PY) -m symmpatterns build-host
	@touch $@
