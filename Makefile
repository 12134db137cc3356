# Needs python3 (3.11 or newer) with pip, nothing else: each verb first makes the environment in $(VENV), or renews it
# when pyproject.toml or constraints.txt has changed.
#
#   make demo     solve three problems on the shipped models, with their search trees
#   make test     all tests
#   make lint     style, formatting, types
#   make format   repair what `make lint` can repair
#   make bench    every bench of the cookbook; an hour or more
#
# An environment that is there already is taken as it is with: make test ENV= VENV=path/to/it

PYTHON ?= python3
VENV ?= .venv
ENV ?= $(VENV)/.installed
BIN := $(abspath $(VENV))/bin
PYTEST_ARGS ?= -n 2
# Its interpreter tests the kernel on a CPU; CUDA builds of torch bring their own.
TRITON ?= 3.6.0

STORY := Some friends compare what they have. Compared with Zoe, Gia owns 17 more maps. Hugo has 10 maps. \
	Ida has 30 maps. Compared with Hugo, Tess owns 9 times as many maps. Zoe has 49 maps. Compared with Tess, Sam owns \
	3 times as many maps. How many maps do Ida, Gia and Sam have together?

.PHONY: demo test lint format bench
.DEFAULT_GOAL := test

# Held-out problems, from `python -m ets_engine.reference --family FAMILY --level LEVEL --seed 7`.
demo: $(ENV)
	$(BIN)/ets solve "Use 1, 3, 7 and 17 to make 22." --tree
	$(BIN)/ets solve "Use 1, 10, 11, 13 and 20 to make 33." --tree
	$(BIN)/ets solve "$(STORY)" --tree

test: $(ENV)
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PYTEST_ARGS)

lint: $(ENV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(ENV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(ENV)
	for family in countdown story; do $(BIN)/ets bench --out runs/bench-$$family --data $$family --widths 16,64; done
	set -e; for script in cookbook/bench_*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python -m pip install --quiet triton==$(TRITON)
	touch $@
