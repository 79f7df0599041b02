# make run     set up what is missing, then serve      (HOST=127.0.0.1 PORT=8000 ARGS="--keys")
# make test    set up what is missing, then test       (ARGS="-k session")
# make check   format, lint, types, layers

PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
ARGS ?=
BIN := .venv/bin
LOCK := deploy/requirements.lock
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint $(LOCK)

.DEFAULT_GOAL := help
.PHONY: help setup run test check format lock bench bench-gpu bench-peers soak

help:
	@sed -n 's/^# //p' Makefile

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("lcm-rt needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv

# The stamps say which set of packages is installed, and are older than the lock once it changes.
.venv/engine: pyproject.toml $(LOCK) | .venv/bin/python
	$(PIP) --editable '.[engine,openvino]'
	@touch $@

.venv/bench: .venv/engine
	$(PIP) --editable '.[engine,openvino,bench]'
	@touch $@

.venv/dev: .venv/engine
	$(PIP) --editable '.[engine,openvino,bench,dev]'
	@touch $@

# What tests need beside Python: a browser, Node and its packages, PostgreSQL.
.venv/system: .ci/install-browser .ci/install-postgres tests/browser/package-lock.json tests/fal/package-lock.json | .venv/bin/python
	.ci/install-browser
	.ci/install-postgres
	cd tests/browser && npm ci --no-audit --no-fund --loglevel=error
	cd tests/fal && npm ci --no-audit --no-fund --loglevel=error
	@touch $@

setup: .venv/engine

run: .venv/engine
	exec $(BIN)/lcm-rt serve --host $(HOST) --port $(PORT) $(ARGS)

test: .venv/dev .venv/system
	$(BIN)/python -m pytest $(ARGS)

check: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py

format: .venv/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Against a running server: make bench ARGS="--sessions 8 --trace recorded"
bench: .venv/bench
	$(BIN)/lcm-rt bench serve $(ARGS)

# All goals for one GPU, 20 minutes; run again to go on: make bench-gpu ARGS="--output benchmarks/results/gpu.json"
bench-gpu: .venv/bench
	$(BIN)/python benchmarks/gpu.py $(ARGS)

# Others beside us, 12 minutes; once before it: make bench-peers ARGS=--install
bench-peers: .venv/bench
	$(BIN)/python -m benchmarks.peers $(ARGS)

# Half an hour of mixed load: does memory stay, and the delay?
soak: .venv/bench
	$(BIN)/python benchmarks/soak.py $(ARGS)

# Resolve everything anew and write down what came out.
lock: .venv/dev
	$(BIN)/python -m pip install --upgrade --editable '.[engine,openvino,bench,dev]'
	{ head -n 1 $(LOCK); $(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu//'; } > $(LOCK).new
	mv $(LOCK).new $(LOCK)
