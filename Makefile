# make demo: the main job on the embedded pipeline.   make test: everything CI runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint effect clean
.DEFAULT_GOAL := test

# torch and torchvision first and pinned: they are built for each other, and open_clip_torch would take the newest of either
$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.14.1 torchvision==0.29.1
	$(BIN)/python -m pip install --quiet -e '.[dev,notebooks,data]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/kspec-guidance demo --out outputs/demo

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest --durations=8

# the figures of the README and the model card
effect: $(VENV)/.installed
	$(BIN)/python benchmarks/effect.py --plot docs/effect.png
	$(BIN)/python benchmarks/gradients.py
	$(BIN)/python benchmarks/where_to_push.py

clean:
	rm -rf $(VENV) outputs .pytest_cache .ruff_cache .mypy_cache
