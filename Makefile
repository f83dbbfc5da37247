# What a developer can do. Each target sets up what it needs on a fresh Debian or Ubuntu machine with
# python3, git and make.

BIN := .venv/bin
VENV := .venv/.dev
ENGINES := .venv/.engines

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-unit test-engines check format protos bench clean

help: ## Say what there is.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(VENV) ## Make .venv with everything that the lock file pins.

$(VENV): pyproject.toml uv.lock scripts/make_venv.sh
	@sh scripts/make_venv.sh dev
	@touch $@

# A real llama.cpp for the tests, built from source: about 4 minutes on two cores, once.
$(ENGINES): $(VENV)
	@sh scripts/ensure_debian.sh gcc g++ libc6-dev
	@echo "building llama.cpp for the tests (a few minutes, once)"
	@sh scripts/make_venv.sh dev engines
	@touch $@

demo: $(VENV) ## Show it working: no GPU, no download of models, about a minute.
	@$(BIN)/rung demo

test: $(ENGINES) ## Run all tests, with a real llama.cpp, a real Docker Engine and real processes.
	@sh scripts/ensure_docker.sh
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test-unit: $(VENV) ## Run the fast tests only.
	$(BIN)/python -m pytest tests/unit tests/contract tests/rpc

test-engines: $(ENGINES) ## Hold the simulators and the adapters to a real vLLM (on the CPU) and a real llama.cpp.
	@sh scripts/ensure_debian.sh libnuma1
	@sh scripts/make_vllm.sh
	$(BIN)/python -m pytest -m "real_vllm or not real_vllm" tests/engines tests/integration/test_real_llamacpp.py

check: $(VENV) ## Lint, types, import rules, protos, generated stubs.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	cd protos && $$(../$(BIN)/python ../scripts/fetch_buf.py) lint
	$(BIN)/python scripts/generate_protos.py --check

format: $(VENV) ## Format the code.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: $(VENV) ## Generate the stubs from protos/.
	$(BIN)/python scripts/generate_protos.py

bench: $(VENV) ## Measure waits under each policy, the choice of a target, watched jobs, and the relay's cost.
	@sh scripts/ensure_debian.sh gcc libc6-dev nginx-light
	@sh scripts/make_venv.sh dev bench
	@for trace in solo-developer family-of-five busy-team; do $(BIN)/rung simulate $$trace || exit 1; done
	$(BIN)/python -m tests.benchmarks.routing
	$(BIN)/python -m tests.benchmarks.streams
	$(BIN)/python -m tests.benchmarks.relay $(BENCH)

clean: ## Remove what these targets made.
	rm -rf .venv .tools .cache/vllm .mypy_cache .ruff_cache .pytest_cache .hypothesis
