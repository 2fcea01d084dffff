# make lab    opens JupyterLab on notebooks/      make lab ARGS="--no-browser --port 8899"
# make test   lint, types, tests                  make test ARGS="tests/routing -x"
# make peers  kt-kernel and llama.cpp, to measure beside ktlab (builds for about 12 minutes)
# make lock   rewrites binder/requirements.txt    make lock ARGS=--upgrade
# Each sets up .venv first, once. PYTHON=python3.12 picks the interpreter.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
ARGS ?=
VENV := $(CURDIR)/.venv
START := notebooks/00_start.ipynb

# Idle OpenMP threads sleep instead of burning the other core: on a busy 2-core machine a prefill of
# 512 tokens took 0.7 s so and 1.1 to 8 s otherwise.
export OMP_WAIT_POLICY ?= PASSIVE

# Everything that Jupyter and IPython write goes into .venv, nothing into the home folder.
JUPYTER := JUPYTER_CONFIG_DIR="$(VENV)/var/jupyter/config" \
	JUPYTER_DATA_DIR="$(VENV)/var/jupyter/data" \
	JUPYTER_RUNTIME_DIR="$(VENV)/var/jupyter/runtime" \
	IPYTHONDIR="$(VENV)/var/ipython"

.PHONY: help lab test venv peers lock clean
help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -5

venv:
	@command -v "$(PYTHON)" >/dev/null || { echo "No $(PYTHON) here: name one, make lab PYTHON=python3.12"; exit 1; }
	@"$(PYTHON)" binder/make_venv.py $(if $(filter command%,$(origin PYTHON)),--named)

# Jupyter refuses to run as root unless told that this is meant.
lab: venv
	@echo "JupyterLab opens $(START); stop it with Ctrl-C"
	@root=""; [ "$$(id -u)" != 0 ] || root="--allow-root"; \
	exec env $(JUPYTER) PATH="$(VENV)/bin:$$PATH" "$(VENV)/bin/jupyter" lab $$root \
		--ServerApp.root_dir="$(CURDIR)" --LabApp.default_url="/lab/tree/$(START)" $(ARGS)

# The browser tests need Chromium; without it they are skipped and say how to get it.
# KTLAB_REQUIRE_BROWSER=1 (set by .ci/run) turns a skipped browser test into a failure.
test: venv
	@"$(VENV)/bin/ruff" check .
	@"$(VENV)/bin/ruff" format --check .
	@"$(VENV)/bin/mypy"
	@"$(VENV)/bin/python" -m pytest $(ARGS)

peers: venv
	@"$(VENV)/bin/python" binder/make_peers.py

lock:
	@bash binder/lock "$(PYTHON)" $(ARGS)

clean:
	rm -rf .venv .peers build dist *.egg-info .artifacts .mypy_cache .pytest_cache .ruff_cache .hypothesis
