# Everything runs in .venv, which is made on first use. `make demo` installs the toolkit alone, the other targets also the tools for developing.
# Another Python: make PYTHON=python3.12 test

PYTHON ?= python3
BENCH ?= digits-sym20 digits-sym40
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt

.PHONY: help demo install lint docs test bench format clean

help:
	@echo "make demo     find bad samples in a small data set, retrain, and write a report"
	@echo "make test     lint, type-check, build the documentation, run the tests"
	@echo "make lint     ruff and mypy alone        make docs     the documentation alone, in site/"
	@echo "make bench    a benchmark, BENCH=row      make format   lay the code out"
	@echo "make install  only make .venv            make clean    remove .venv and everything built"

demo: $(VENV)/.core
	$(BIN)/robust-if demo

install: $(VENV)/.dev

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

test: lint docs
	$(BIN)/pytest --durations=10

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/detection.py $(BENCH)
	$(BIN)/python benchmarks/detection.py --table

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found: install Python 3.11 or newer, or name one: make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "robust-if needs Python 3.11 or newer, but $(PYTHON) is %d.%d; name a newer one: make PYTHON=python3.12" % v[:2])'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) lacks the venv module: install it, on Debian and Ubuntu by apt-get install python3-venv"; exit 1; }
	@echo "Making $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing torch and the toolkit into $(VENV); the first time this takes a few minutes"
	@$(PIP) torch
	@$(PIP) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	@echo "Installing the tools for developing into $(VENV)"
	@$(PIP) --editable '.[dev,docs]'
	@$(PIP) --no-deps torchattacks  # it asks for torchvision, which it does not import and which would replace torch
	@touch $@
