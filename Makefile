# The package lives in .venv; PIP_* variables of the environment are honoured, and so is PYTHON.
PYTHON ?= python3
VENV := .venv
# One thread per process: ranks and test workers already take a core each. The hub is not used.
OFFLINE := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
PYTEST := $(OFFLINE) $(VENV)/bin/python -m pytest
# Tests of one file share what they made, so one worker runs all tests of a file. The files have the
# order that tests/conftest.py gives them. Tests wait for processes a sixth of their time: on two cores
# a third worker saves an eighth. Slow tests start more processes of their own, and have two workers.
WORKERS ?= 3
SLOW_WORKERS ?= 2
SHARED := --dist loadfile --no-loadscope-reorder --durations=20

.PHONY: help setup demo peers test test-slow test-slurm test-quantize test-browser \
	screenshot check clean
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 16

setup: $(VENV)/installed ## make .venv and install the package with the tested versions

$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: setup ## fine-tune teachers and distil them on the built-in task, two processes, offline
	$(OFFLINE) $(VENV)/bin/python -m torch.distributed.run --standalone --nproc_per_node 2 \
		-m sead_dist demo

test: setup ## all tests but the slow ones and those that need a cluster or a browser
	$(PYTEST) -n $(WORKERS) $(SHARED) -m 'not slow and not slurm and not browser'

# a benchmark alone needs it, so it is kept out of the environment itself
peers: setup ## install TextBrewer, which a benchmark compares with, for test-slow
	$(VENV)/bin/python -m pip install --quiet --no-deps --upgrade -c constraints.txt \
		--target $(VENV)/peers textbrewer

test-slow: setup ## the slow tests, with a smoke test of every benchmark
	PYTHONPATH=$(CURDIR)/$(VENV)/peers $(PYTEST) -n $(SLOW_WORKERS) $(SHARED) -m 'slow and not slurm' || [ $$? -eq 5 ] # 5: there are none

test-slurm: setup ## the tests that need a cluster; tests/cluster/start.sh says how to get one
	$(PYTEST) -m slurm tests/cluster

# torchao slows down every import of Transformers, so it is kept out of the environment itself
test-quantize: setup ## the tests of 8-bit weights, with torchao beside the environment
	$(VENV)/bin/python -m pip install --quiet --no-deps --upgrade -c constraints.txt \
		--target $(VENV)/quantize torchao
	PYTHONPATH=$(VENV)/quantize $(PYTEST) -m quantize

test-browser: setup ## the tests of a sweep's page in chromium (Debian: apt-get install chromium)
	$(PYTEST) -m browser tests/sweep/test_page.py

screenshot: setup ## write a picture of a page: REPORT=report.html PICTURE=report.png
	$(VENV)/bin/python tests/browser.py $(REPORT) $(PICTURE)

check: setup ## lint, formatting, types and the levels of imports
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

clean: ## remove all that these targets made
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache demo-run
	find sead_dist tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
