# The only commands to know. `make demo` and `make test` build .venv first if it is not there.
.DEFAULT_GOAL := help
.PHONY: help setup demo demo-vision demo-recsys test test-fast check docs bench golden clean

PYTHON ?=
VARIANT ?=
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1

help:  ## Show these lines
	@grep -hE '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 12

setup:  ## Build .venv with pinned dependencies (CPU or GPU, whichever is there)
	@PYTHON="$(PYTHON)" VARIANT="$(VARIANT)" ./install.sh

demo: setup  ## Teacher under vLLM -> cache -> student -> results, on a real model and real text
	@$(BIN)/stillroom demo runbooks/demo.toml --control runbooks/demo-control.toml \
		--elsewhere runbooks/demo-elsewhere.toml

demo-vision: setup  ## A small image-text teacher under vLLM -> vision targets -> students -> results
	@$(BIN)/stillroom demo-vision runbooks/demo-vision.toml

demo-recsys: setup  ## An LLM as teacher of small recommenders: items, lists, students -> results
	@$(BIN)/stillroom demo-recsys runbooks/demo-recsys.toml

# Files of tests go to as many processes as there are cores; a file stays in one, with its fixtures.
test: setup  ## The whole test suite
	@$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

test-fast: setup  ## Without the tests that start a vLLM engine, Ray, or take over 20 seconds
	@$(BIN)/python -m pytest -m "not vllm and not ray and not slow"

check: setup  ## Lint, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

docs: setup  ## The documentation as web pages, in build/site
	@$(BIN)/python -c 'import mkdocs, material, mkdocstrings' 2>/dev/null || $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	@PYTHONPATH=. NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

bench: setup  ## Run every benchmark; each prints one JSON object
	@$(BIN)/stillroom teacher fetch smollm2
	@for name in $$(grep -l __main__ benchmarks/*.py | xargs -n1 basename -s .py); do \
		echo "benchmarks.$$name"; $(BIN)/python -m benchmarks.$$name --json || exit 1; \
	done

golden: setup  ## Make golden fixtures of a new format version; old ones are never rewritten
	@for name in $$(ls tests/golden/make_*.py | xargs -n1 basename -s .py); do \
		$(BIN)/python -m tests.golden.$$name || exit 1; \
	done

clean:  ## Remove results of runs; keeps .venv and downloaded models
	rm -rf runs build dist
