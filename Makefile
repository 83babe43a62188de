# Works on a bare machine with make and Python 3.11-3.13; the first target sets up .venv by itself.
# PYTHON=/path/to/python chooses the interpreter. What each step does is in scripts/setup_env.sh.
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
READY_DEV := $(VENV)/.ready-dev
OUT ?= demo-out
TEST_WORKERS ?= 2
FUZZ ?= 3000

.DEFAULT_GOAL := help
.PHONY: help venv venv-dev demo smoke test fuzz check lint format docs docs-serve wheel extras lower-bounds clean distclean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): pyproject.toml constraints.txt scripts/setup_env.sh
	bash scripts/setup_env.sh $(VENV)
	@touch $@

$(READY_DEV): pyproject.toml constraints.txt scripts/setup_env.sh
	bash scripts/setup_env.sh $(VENV) dev
	@touch $(READY) $@

venv: $(READY)  ## set up .venv to run the package

venv-dev: $(READY_DEV)  ## set up .venv with the tools for tests, checks and docs

demo: $(READY)  ## refine the shipped encoder on the shipped images (OUT=demo-out)
	$(BIN)/mim-refiner demo --out $(OUT)

smoke: $(READY)  ## the demo in its smallest form, in a folder that is thrown away
	out=$$(mktemp -d) && trap 'rm -rf "$$out"' EXIT && $(BIN)/mim-refiner demo --smoke --out "$$out/demo"

# One thread a worker: the workers already fill the cores, and small tensors gain nothing from more.
test: $(READY_DEV)  ## the whole test suite; builds the documentation too
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS)

fuzz: $(READY_DEV)  ## damaged inputs for every reader, thousands of each (FUZZ=3000)
	OMP_NUM_THREADS=1 MIM_REFINER_FUZZ=$(FUZZ) $(BIN)/python -m pytest -n $(TEST_WORKERS) -o timeout=7200 -k "fuzz or damage"

lint: $(READY_DEV)  ## style only (seconds)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

check: lint  ## style, types and layers
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY_DEV)  ## rewrite the files in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY_DEV)  ## the documentation, to site/ (offline; warnings are errors)
	$(BIN)/mkdocs build --strict

docs-serve: $(READY_DEV)  ## the documentation in a browser, rebuilt as you write
	$(BIN)/mkdocs serve

wheel:  ## wheel and sdist, to dist/, and the demo from the wheel in an empty environment
	bash scripts/test_wheel.sh

extras:  ## the tests of wandb, mlflow and umap, which make test skips
	bash scripts/test_extras.sh

lower-bounds:  ## the quick tests with the oldest dependencies that pyproject.toml allows
	bash scripts/test_lower_bounds.sh

clean:  ## remove caches and build products (keeps .venv and run folders)
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## remove .venv too
	rm -rf $(VENV)
