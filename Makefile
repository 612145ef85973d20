PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PRESET ?= maml-trpo/half-cheetah-dir-quick

.PHONY: train test soak lint types clean

# The set-up alone: a virtual environment with the locked versions of constraints.txt.
$(VENV): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "metaloop needs Python 3.11 or newer; give one with: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[atari,dev,video]'
	touch $(VENV)

train: $(VENV)
	$(BIN)/metaloop train $(PRESET)

test: $(VENV)
	$(BIN)/python -m pytest

# Fifty kills in one run without lag, and fifty in one with it: some twenty minutes.
soak: $(VENV)
	$(BIN)/python -m tests.cluster.soak --kills 50
	$(BIN)/python -m tests.cluster.soak --kills 50 --asynchronous

lint: $(VENV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)
	$(BIN)/mypy

clean:
	rm -rf $(VENV)
