# Each target does all its own set-up. `make demo` and `make test` are all that a newcomer needs.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
BIN := .venv/bin

# Where torch comes from: a folder of wheels that pip is configured to look at, if it has one of torch; else uv looks at
# the machine and takes the CPU build where there is no GPU, so that no CUDA package is downloaded in vain.
FOLDERS = $(or $(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null))
WHEELS = $(firstword $(foreach folder,$(FOLDERS),$(if $(wildcard $(folder)/torch-2.13*),$(folder))))
TORCH_SOURCE = $(if $(WHEELS),--find-links "$(WHEELS)",--torch-backend=$(or $(UV_TORCH_BACKEND),auto))

# Where Python may keep no bytecode, every process would spend up to ten seconds of CPU on making it: it is made once.
BYTECODE = $(if $(PYTHONDONTWRITEBYTECODE),--compile-bytecode)

.PHONY: help install demo up down status automations test test-all bench lint mlflow image lock clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

install: .venv/installed  ## make the virtual environment

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' \
	  || { echo "expected Python 3.11 or 3.12; found $$($(PYTHON) --version); set PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(BIN)/uv pip install --quiet --python $(BIN)/python $(TORCH_SOURCE) $(BYTECODE) --editable '.[dev]'
	@touch $@

demo: install  ## adapt a real model to real data, compare it with full fine-tuning, register it
	@$(BIN)/python -m flows.retrain --preset tweets

up: install  ## start S3, MLflow, Prefect and its workers, and keep them up
	@$(BIN)/python -m infra.local up

down: install  ## end them; data stay
	@$(BIN)/python -m infra.local down

status: install  ## what of it is up
	@$(BIN)/python -m infra.local status

automations: install  ## let Prefect notify ADAPTERLINE_WEBHOOK_URL of failed gates and crashes
	@$(BIN)/python -m infra.automations

test: install  ## the tests, but those that take minutes each
	@$(BIN)/python -m pytest -n 2 --dist loadgroup --faults -m "not long"

test-all: install  ## all tests
	@$(BIN)/python -m pytest -n 2 --dist loadgroup --faults

bench: install  ## adapters against AdapterHub and full fine-tuning, in one run: hours; BENCH='--rows 300' for less
	@$(BIN)/python -m tests.benchmarks.train $(BENCH)

lint: install  ## style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

mlflow: install  ## review runs in the MLflow UI
	@$(BIN)/python -m infra.local mlflow

image:  ## build the images; TORCH=cuda for GPUs, BASE_IMAGE=… for another Python
	@WHEELS="$(WHEELS)" TORCH="$(or $(TORCH),cpu)" IMAGE="$(IMAGE)" BASE_IMAGE="$(BASE_IMAGE)" infra/image.sh $(TARGETS)

# The lock of the CUDA build decides the versions of the others, which differ from it in torch or have none.
LOCK = $(BIN)/uv pip compile --quiet --generate-hashes --only-binary :all: --python-version 3.11 \
  --python-platform x86_64-manylinux_2_28 --custom-compile-command "make lock" $(UPGRADE)

lock: install  ## pin what the images install; UPGRADE=--upgrade takes newer releases
	@$(LOCK) pyproject.toml -o infra/lock/cuda.txt
	@$(LOCK) pyproject.toml $(if $(WHEELS),--find-links "$(WHEELS)",--torch-backend=cpu) -c infra/lock/cuda.txt -o infra/lock/cpu.txt
	@$(LOCK) infra/lock/server.in -c infra/lock/cuda.txt -o infra/lock/server.txt
	@$(LOCK) infra/lock/uv.in -o infra/lock/uv.txt

clean:  ## remove the environment and everything that was trained here
	@if [ -e out/stack/stack.json ]; then $(BIN)/python -m infra.local down; fi
	rm -rf .venv out build *.egg-info
