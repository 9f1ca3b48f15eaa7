# make demo: plain and guided images of the embedded pipeline.   make quick: after each edit.   make test: everything CI runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# a process per core, one thread each: several threads for one small tensor cost more than they gain
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

.PHONY: demo quick test pytest gpu lint space docs oldest support overhead step memory synthesis arena arena-small effect clean
.DEFAULT_GOAL := test

# torch and torchvision first and pinned: they are built for each other, and open_clip_torch would take the newest of either;
# not compiled, which takes a minute for 400 MB of modules: Python compiles and keeps those that are imported
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(BIN)/python -m pip install --quiet --no-compile
$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(INSTALL) torch==2.14.1 torchvision==0.29.1
	$(INSTALL) -e '.[dev,notebooks,data]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/kspec-guidance demo --out outputs/demo

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

quick: lint
	$(PYTEST) -m "not slow"

# both at once: the checkers run on one core
test: $(VENV)/.installed
	$(MAKE) --no-print-directory --jobs=2 lint pytest
pytest: $(VENV)/.installed
	$(PYTEST) --durations=25

# what needs a CUDA device: tests with true kernels, copies and offloading, and the tables of docs/gpu.md
gpu: $(VENV)/.installed
	$(BIN)/python -m pytest -m gpu tests/gpu
	$(BIN)/python benchmarks/gpu.py

# the app of examples/space on port 7860, and the site in outputs/site
space: $(VENV)/.installed
	$(BIN)/python examples/space/app.py
docs: $(VENV)/.installed
	$(BIN)/python -m mkdocs build --strict

# guidance on the oldest diffusers and transformers that pyproject.toml allows, laid over the environment above
OLDEST := .venv-oldest
oldest: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target $(OLDEST) diffusers==0.35.2 transformers==4.56.2 \
		tokenizers==0.22.1 huggingface-hub==0.34.6
	PYTHONPATH=$(OLDEST) $(BIN)/python -m pytest tests/guidance tests/loop tests/integrations tests/demo

# the support matrix and what guidance costs; `make support` takes four minutes, `make overhead` ten
support: $(VENV)/.installed
	$(BIN)/python benchmarks/support_matrix.py
overhead: $(VENV)/.installed
	$(BIN)/python benchmarks/overhead.py
step: $(VENV)/.installed
	$(BIN)/python benchmarks/step.py

# what a memory costs, and what it buys over a whole run: half an hour each, on an idle machine
memory: $(VENV)/.installed
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/synthesis_page.py
synthesis: $(VENV)/.installed
	$(BIN)/python benchmarks/synthesis.py --plot docs/synthesis.png
	$(BIN)/python benchmarks/synthesis_page.py

# all methods side by side: hours, and it goes on where it was stopped; the small version takes minutes
arena: $(VENV)/.installed
	$(BIN)/python -m benchmarks.arena
	$(BIN)/python -m benchmarks.arena.matching
	$(BIN)/python -m benchmarks.arena.ablations
	$(BIN)/python -m benchmarks.arena.longruns
	$(BIN)/python -m benchmarks.arena.smallsets
	$(BIN)/python -m benchmarks.arena.cost
	$(BIN)/python -m benchmarks.arena.page
arena-small: $(VENV)/.installed
	$(BIN)/python -m benchmarks.arena --small --out outputs/arena --docs outputs/arena

# the figures of docs/how-it-works.md and the model card
effect: $(VENV)/.installed
	$(BIN)/python benchmarks/effect.py --plot docs/effect.png
	$(BIN)/python benchmarks/gradients.py
	$(BIN)/python benchmarks/where_to_push.py

clean:
	rm -rf $(VENV) .venv-oldest outputs .pytest_cache .ruff_cache .mypy_cache
