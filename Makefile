# Needs Python 3.11 or newer, make, and a package index. `make help` lists the commands.
PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup train train-gpt train-hf test test-all lint format notebooks docs bench clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv: taskgrad, its extras and the development tools

# A .venv without a working pip is one that an earlier try left half made.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "taskgrad needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

train: setup ## train the example network: make train ARGS='--help'
	$(BIN)/python examples/train_resnet.py $(ARGS)

train-gpt: setup ## train the example GPT, and let it write: make train-gpt ARGS='--steps 2000'
	$(BIN)/python examples/train_gpt.py $(ARGS)

train-hf: setup ## train a model of transformers: make train-hf ARGS='--model gpt2 --check'
	$(BIN)/python examples/train_huggingface.py $(ARGS)

PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

test: setup ## run the tests but the long ones, two files at a time: make test ARGS='-k vjp'
	$(PYTEST) -m 'not long' $(ARGS)

test-all: setup ## run all tests, the long ones too
	$(PYTEST) $(ARGS)

lint: setup ## check style, types and which module imports which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy taskgrad
	$(BIN)/lint-imports

format: setup ## put the code in the one format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: setup ## run every notebook from top to bottom; the first error stops it
	@out=$$(mktemp -d) && trap 'rm -rf "$$out"' EXIT && \
	for notebook in notebooks/*.ipynb; do \
		test -e "$$notebook" || { echo "no notebooks"; break; }; \
		echo "== $$notebook"; \
		$(BIN)/python -m nbconvert --to notebook --execute \
			--ExecutePreprocessor.timeout=600 --output-dir "$$out" "$$notebook" || exit 1; \
	done

docs: setup ## run the code in README.md and docs/
	$(BIN)/python docs/check_snippets.py

bench: setup ## measure taskgrad against its rivals; writes docs/benchmarks.md
	$(BIN)/python -m benchmarks $(ARGS)

clean: ## remove .venv, caches and what training wrote
	rm -rf $(VENV) build dist runs dask-worker-space .pytest_cache .mypy_cache .ruff_cache \
		.import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
