# Two commands set everything up on a machine that has git, make, Python >= 3.10 and pip:
#   make demo    trains a first student on the embedded default and shows what it learned
#   make test    runs every check that CI runs
# On a machine with a GPU a third one tests it, measures its speed and trains on it, in nine minutes:
#   make gpu-check
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check docs gpu-check clean

demo: .venv/installed
	$(BIN)/python train.py strategy=decoupled encoder=efficientnet_lite0

test: check docs
	$(BIN)/python -m pytest

gpu-check: .venv/installed
	$(BIN)/python scripts/gpu_check.py

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The site, in site/; with REPO_URL its links to code lead there. The variable silences Material's word on its successor.
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv || ($(PYTHON) -m pip install --user virtualenv && $(PYTHON) -m virtualenv .venv)
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv site .mypy_cache .pytest_cache .ruff_cache
