# Everything runs in .venv, which `make setup` makes from a lock file; each target that needs it calls it first.
# Variables: LOCK (cpu or gpu; default: gpu where there is an NVIDIA GPU and no .venv yet), PYTHON (the interpreter that
# .venv is made with), LATEST_PYTHON (that of `make test-latest`). pip's variables and configuration files are respected.

# What .venv was made for stays, so that LOCK need not be repeated. Earlier versions had one lock and left no .lock.
MADE_FOR := $(or $(shell cat .venv/.lock 2>/dev/null),$(if $(wildcard .venv/.setup-done),cpu))
ifndef LOCK
  HAS_GPU := $(or $(wildcard /dev/nvidia0),$(shell command -v nvidia-smi))
  LOCK := $(or $(MADE_FOR),$(if $(HAS_GPU),gpu,cpu))
endif
ifeq ($(filter cpu gpu,$(LOCK)),)
  $(error LOCK=$(LOCK) is unknown: use cpu or gpu)
endif
LOCK_FILE := $(if $(filter gpu,$(LOCK)),requirements-gpu.lock,requirements.lock)
PYTHON_VERSION := $(if $(filter gpu,$(LOCK)),3.12,3.11)
PYTHON ?= python$(PYTHON_VERSION)
LATEST_PYTHON ?= python3.12
unexport PYTHON # the scripts use .venv's
VENV := .venv
RUN := $(VENV)/bin/python
BENCH_VENV := .bench-venv
LATEST_VENV := .latest-venv
STAMP := $(VENV)/.setup-done
LOG := $(VENV)/setup.log

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup test test-slow test-latest lint check-ranges quickstart bench clean

help: ## what can be made
	@echo 'usage: make TARGET'
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' Makefile | expand -t 14

setup: $(STAMP) ## .venv with everything, from a lock file (does nothing if it is up to date) [LOCK=cpu|gpu]
	@cat $(STAMP)

# Another lock is another environment: its stamp must not pass for this one's.
ifneq ($(MADE_FOR),$(LOCK))
.PHONY: $(STAMP)
endif

# Plain pins without dependency resolution: see the heads of the lock files. A CUDA build of torch also needs NVIDIA's
# libraries in the versions that its own metadata name; the call of pip with --constraint installs them, and for the CPU
# build it does nothing. transformer-engine-torch is built from source against the installed torch.
$(STAMP): $(LOCK_FILE) setup.py pyproject.toml
	@command -v $(PYTHON) >/dev/null && \
	  $(PYTHON) -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] != "$(PYTHON_VERSION)")' 2>/dev/null || { \
	  echo 'error: $(PYTHON) is not a Python $(PYTHON_VERSION), which $(LOCK_FILE) is for: install it, or run make' \
	    'PYTHON=/path/to/python$(PYTHON_VERSION), or set LOCK=$(if $(filter gpu,$(LOCK)),cpu to run on the CPU,gpu)' >&2; exit 2; }
	@echo 'make setup: installs $(words $(shell grep -v "^\#" $(LOCK_FILE))) packages of $(LOCK_FILE) into $(VENV)' \
	  "with $$($(PYTHON) --version)"
ifeq ($(LOCK),gpu)
	@echo '  needs Linux x86-64, a package index and a C++ compiler; 14 GB of disk, and 20 minutes of one core to build' \
	  "Transformer Engine's extension"
else
	@echo '  needs Linux x86-64 and a package index; 3 GB of disk and 3 to 8 minutes with the CPU build of torch,' \
	  '7 GB and 3 minutes more with the CUDA build'
endif
	@echo '  log: $(LOG)'
	@start=$$SECONDS; \
	[[ '$(MADE_FOR)' == $(LOCK) ]] && $(RUN) -c '' 2>/dev/null || \
	  $(PYTHON) -m venv --clear $(VENV) || { \
	  echo 'error: $(PYTHON) cannot make a virtual environment:' \
	    'install its venv and ensurepip modules (python$(PYTHON_VERSION)-venv on Debian)' >&2; exit 2; }; \
	{ $(RUN) -m pip install --no-deps -r <(grep -v '^transformer-engine-torch==' $(LOCK_FILE)) && \
	  $(RUN) -m pip install --constraint $(LOCK_FILE) "$$(grep '^torch==' $(LOCK_FILE))" && \
	  if [[ $(LOCK) == gpu ]]; then \
	    wheel=$$(scripts/transformer_engine_wheel.sh $(RUN)) && $(RUN) -m pip install --no-deps "$$wheel"; \
	  fi && \
	  $(RUN) -m pip install --no-deps --no-build-isolation -e . ; } >$(LOG) 2>&1 || { \
	  tail -n 15 $(LOG) >&2; \
	  echo 'error: pip failed (above; whole log in $(LOG)): fix the cause and run make setup again' >&2; exit 2; }; \
	$(RUN) -c 'import torch; cuda = torch.version.cuda; \
	  print(f"set-up: $(LOCK_FILE), torch {torch.__version__}, the", f"CUDA {cuda}" if cuda else "CPU", "build")' >$(STAMP).tmp; \
	echo $(LOCK) >$(VENV)/.lock; \
	mv $(STAMP).tmp $(STAMP); \
	echo "make setup: done in $$((SECONDS - start)) s, $$(du -sh $(VENV) | cut -f1) in $(VENV)"

test: setup ## the tests, at most 15 minutes on two cores
	$(RUN) -m pytest -m "not slow" -n logical --dist loadfile

test-slow: setup ## the long tests, at most 45 minutes more
	$(RUN) -m pytest -m slow

test-latest: $(LATEST_VENV)/.setup-done ## unit and distributed tests with the newest Megatron and Transformer Engine
	$(LATEST_VENV)/bin/python -m pytest -m "not slow" -rsfE -n logical --dist loadfile tests/unit tests/distributed

# Python 3.12 with torch's CUDA build on the CPU; Transformer Engine's extension is built once and kept outside the clone.
$(LATEST_VENV)/.setup-done: requirements-latest.lock scripts/transformer_engine_wheel.sh setup.py pyproject.toml
	@$(LATEST_PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null || { \
	  echo 'error: $(LATEST_PYTHON) is not a Python 3.12, which requirements-latest.lock is for:' \
	    'install it, or run make test-latest LATEST_PYTHON=/path/to/python3.12' >&2; exit 2; }
	@echo 'make test-latest: installs into $(LATEST_VENV): 6 GB and 4 minutes, and 15 minutes more the first time;' \
	  'log: $(LATEST_VENV)/setup.log'
	@$(LATEST_VENV)/bin/python -c '' 2>/dev/null || $(LATEST_PYTHON) -m venv --clear $(LATEST_VENV)
	@$(LATEST_VENV)/bin/python -m pip install --no-deps -r requirements-latest.lock >$(LATEST_VENV)/setup.log 2>&1 && \
	  wheel=$$(scripts/transformer_engine_wheel.sh $(LATEST_VENV)/bin/python) && \
	  $(LATEST_VENV)/bin/python -m pip install --no-deps "$$wheel" >>$(LATEST_VENV)/setup.log 2>&1 && \
	  $(LATEST_VENV)/bin/python -m pip install --no-deps --no-build-isolation -e . >>$(LATEST_VENV)/setup.log 2>&1 || { \
	  tail -n 15 $(LATEST_VENV)/setup.log >&2; echo 'error: pip failed (above): fix the cause and run make test-latest again' >&2; exit 2; }
	@touch $@

lint: setup ## ruff, mypy, import-linter, codespell and shellcheck over everything
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports --no-logo --no-cache
	$(VENV)/bin/codespell
	$(VENV)/bin/shellcheck .ci/run \
	  $$(find . -path './.*' -prune -o -path ./runs -prune -o \( -name '*.sh' -o -name '*.sbatch' \) -print)

check-ranges: setup ## each lower bound of setup.py installed and imported, 10 minutes and 6 GB for a while
	$(RUN) -m scripts.check_ranges

quickstart: setup ## self-play end to end on this machine; DATA=FILE for your own SFT data [EVAL= OUT= ENGINE= SEED=]
	examples/quickstart/quickstart.sh $(foreach name,DATA EVAL OUT ENGINE SEED,$(if $($(name)),'$(name)=$($(name))'))

bench: setup $(BENCH_VENV)/.setup-done ## speed against TRL and a hand-written bound, 15 minutes [DATA= REPEATS= ROWS=]
	$(RUN) -m benchmarks.run $(if $(DATA),--data '$(DATA)') $(if $(REPEATS),--repeats $(REPEATS)) $(if $(ROWS),--rows $(ROWS))

# TRL's environment, apart from ours. torch stands without a build tag; a CUDA build brings its own libraries, as above.
$(BENCH_VENV)/.setup-done: benchmarks/trl.lock | setup
	@echo 'make bench: installs TRL into $(BENCH_VENV), once: 1.5 GB and 2 minutes with the CPU build of torch; log: $(BENCH_VENV)/setup.log'
	@$(BENCH_VENV)/bin/python -c '' 2>/dev/null || $(RUN) -m venv --clear $(BENCH_VENV)
	@{ $(BENCH_VENV)/bin/python -m pip install --no-deps -r benchmarks/trl.lock && \
	  $(BENCH_VENV)/bin/python -m pip install --constraint benchmarks/trl.lock "$$(grep '^torch==' benchmarks/trl.lock)" ; } >$(BENCH_VENV)/setup.log 2>&1 || { \
	  tail -n 15 $(BENCH_VENV)/setup.log >&2; echo 'error: pip failed (above): fix the cause and run make bench again' >&2; exit 2; }
	@touch $@

clean: ## .venv, .bench-venv, .latest-venv and caches; runs/ stays
	rm -rf $(VENV) $(BENCH_VENV) $(LATEST_VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
