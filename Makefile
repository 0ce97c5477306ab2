# `make demo` runs the main job, `make test` the tests. Both create .venv if necessary; `make setup` does only that.
# Extra arguments for pip go into PIP_ARGS, e.g.
#   make demo PIP_ARGS="--index-url URL_OF_PYTORCHS_CPU_WHEELS --extra-index-url YOUR_MIRROR"
PYTHON ?= python3
PIP_ARGS ?=
WORKERS := -n logical --maxprocesses 4 --dist loadfile
ARGS ?=

ifeq ($(OS),Windows_NT)
BIN := .venv/Scripts
else
BIN := .venv/bin
endif

.PHONY: setup demo test test-all check bench docs page clean

setup: .venv/ready

demo: .venv/ready
	$(BIN)/python -m khaosz demo $(ARGS)

test: .venv/ready-dev
	$(BIN)/python -m pytest $(WORKERS) -m "not slow and not network and not gpu and not browser" $(ARGS)

test-all: .venv/ready-clients
	$(BIN)/python -m pytest -m "not gpu" $(ARGS)

check: .venv/ready-dev
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy
	$(BIN)/python -m tests.wording

bench: .venv/ready-dev
	$(BIN)/python -m bench $(ARGS)

# Builds the page of the service from web/ into khaosz/serve/page. Only this target needs npm.
page:
	cd web && npm ci --no-fund --no-audit && npm run build

docs: .venv/ready-dev
	$(BIN)/python -m docs

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/ready: pyproject.toml constraints.txt setup_env.py
	$(PYTHON) setup_env.py train $(PIP_ARGS)

.venv/ready-dev: pyproject.toml constraints.txt setup_env.py
	$(PYTHON) setup_env.py dev $(PIP_ARGS)

# What make test-all needs beyond that: clients of other projects.
.venv/ready-clients: pyproject.toml constraints.txt setup_env.py
	$(PYTHON) setup_env.py clients $(PIP_ARGS)
