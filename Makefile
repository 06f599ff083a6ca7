# Every target sets up what it needs. PYTHON=/path/to/python chooses the interpreter (3.11 to 3.13); where none fits, uv
# fetches one. UV=1 installs with uv.
SHELL := /bin/sh
export PATH := $(CURDIR)/.venv/bin:$(PATH)
READY := .venv/.ready
SHOWN := --only-changed --keep 'success_rate|return|prediction_error|controllability' \
	--drop '(data|flows|prelar|reports)/.*|.*[.]yaml|metrics[.]json|Created'
PYTEST := OMP_NUM_THREADS=1 python -m pytest
# Apart from the others, which would take half as long again where lines are counted.
OF_MODEL := tests/model tests/test_methods.py

.DEFAULT_GOAL := help
.PHONY: help setup repro test test-model test-long test-live lint format bench bench-learning demo-model docs ui show check lock params results clean rlbench-setup

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): requirements.lock tools/setup.sh
	@PYTHON="$(PYTHON)" UV="$(UV)" sh tools/setup.sh

setup: $(READY) ## create .venv with the locked dependencies

rlbench-setup: $(READY) ## install RLBench for live demonstrations; needs CoppeliaSim and COPPELIASIM_ROOT
	@PYTHON=.venv/bin/python sh tools/rlbench_setup.sh

check: $(READY) ## validate params.yaml
	@python -m prelar check

repro: check ## run the pipeline of dvc.yaml at the scale of params.yaml
	@dvc repro
	@echo "The report: $(CURDIR)/reports/index.html"

test: $(READY) ## run the linters and the tests
	@sh tools/browser.sh
	@$(MAKE) --no-print-directory --jobs 2 lint test-model
	@$(PYTEST) -n 2 --dist loadfile --no-loadscope-reorder $(OF_MODEL:%=--ignore=%) --durations 15

test-model: $(READY)
	@$(PYTEST) $(OF_MODEL) --cov=prelar.model --cov-report=term-missing:skip-covered --cov-fail-under=95

test-long: $(READY) ## run the long tests: repeated kills, fuzzing and learning runs
	@python -m pytest -m long

test-live: $(READY) ## collect demonstrations of three tasks in CoppeliaSim
	@python -m pytest -m live

lint: $(READY) ## check format, lint, types and import directions
	@ruff format --check --quiet . || { echo "error: not formatted; run make format"; exit 1; }
	@ruff check --quiet .
	@mypy --no-error-summary
	@lint-imports --no-logo > .import_linter.log || { cat .import_linter.log; exit 1; }

format: $(READY) ## format the code and apply the linter's fixes
	@ruff format . && ruff check --fix .

bench: $(READY) ## measure speed against peers and bounds, to reports/bench.json
	@python -m tests.bench

bench-learning: $(READY) ## check that the agent beats random actions: three tasks, five seeds, about two hours
	@python -m tests.bench.learning

docs: $(READY) ## render docs/ and the API to reports/site
	@NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict --quiet
	@echo "The site: $(CURDIR)/reports/site/index.html"

ui: $(READY) ## serve the flows in the Prefect UI on this machine
	@python -m flows.serve

show: $(READY) ## compare experiments: the params that differ, and the metrics
	@dvc exp show $(SHOWN)

demo-model: $(READY) ## replace the model that the package ships by the agent in the workspace
	@python -m prelar.simulator.demo

lock: $(READY) ## resolve pyproject.toml to requirements.lock
	@python tools/lock.py

params: $(READY) ## write docs/params.md from prelar/config.py and params.yaml
	@PYTHONPATH=. python tools/params_page.py

results: $(READY) ## write docs/results.md from the tables in results/
	@PYTHONPATH=. python tools/results_page.py

clean: ## remove the caches of tools; data, downloads and results are kept
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .import_linter.log tests/output
	find prelar flows tests -name __pycache__ -type d -prune -exec rm -rf {} +
