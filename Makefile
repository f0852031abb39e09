# The two commands of a new user are `make quickstart` and `make test`; both set the environment up when needed.
PYTHON ?= python3.11

# One thread a process: policy ranks, PRM, engine and verifiers share the cores, and more threads each only fight.
export OMP_NUM_THREADS := 1
export OMP_WAIT_POLICY := PASSIVE
export TOKENIZERS_PARALLELISM := false
# Nothing is fetched or sent at run time.
export HF_HUB_OFFLINE := 1
export HF_DATASETS_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export RAY_USAGE_STATS_ENABLED := 0
export VLLM_NO_USAGE_STATS := 1
export DO_NOT_TRACK := 1
export MPLBACKEND := Agg

.PHONY: help quickstart setup test test-full lint format clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

quickstart: setup ## set up, train the embedded task with PRIME, evaluate it before and after (under 12 minutes)
	@.venv/bin/rlprm train recipe=chain_arithmetic_cpu name=quickstart resume=auto --summary

setup: ## create .venv from cluster/lock/cpu.txt; does nothing when that is up to date
	@PYTHON="$(PYTHON)" cluster/setup_cpu.sh

test: setup ## every test that needs no GPU, without the long ones (under 25 minutes)
	@.venv/bin/python -m pytest -q -m "not gpu and not long"

test-full: setup ## ... and the long ones (under 60 minutes)
	@.venv/bin/python -m pytest -q -m "not gpu"

lint: setup ## style and format, nothing is changed
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .

format: setup ## mend what ruff can mend
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .

clean: ## remove caches and build outputs; runs/ and .venv stay
	@rm -rf build dist .pytest_cache .ruff_cache .hypothesis
	@find rlprm tests -name __pycache__ -type d -prune -exec rm -rf {} +
