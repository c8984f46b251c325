# Two commands matter: `make demo` and `make test`. Both set everything up first; they need Python >= 3.10 and nothing else.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# On a machine without a GPU, `make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"` saves gigabytes.
PIP_ARGS ?=

.PHONY: help setup demo test check fix bench fuzz docs clean

help:            ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.installed  ## make .venv and install everything, pinned

$(VENV)/.installed: pyproject.toml .ci/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c .ci/constraints.txt -e '.[dev,llamacpp]'
	touch $@

demo: setup      ## quantize the built-in models and show by their scores what that cost
	$(BIN)/qtool demo

test: setup      ## run the whole suite
	$(BIN)/python -m pytest

check: setup     ## ruff, mypy strict, import layers, docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py tests/test_docs.py

fix: setup       ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

fuzz: setup      ## ten thousand damaged GGUF files
	QTOOL_FUZZ_EXAMPLES=2500 $(BIN)/python -m pytest -q tests/gguf_file/test_fuzz.py

bench: setup     ## measure speed and memory on full-size checkpoints (60 GB of disk, about half an hour)
	$(BIN)/python -m tests.upstream
	$(BIN)/python -m tests.bench

docs: setup      ## write the generated pages again (docs/cli.md)
	$(BIN)/python -m tests.docs_pages

clean:           ## remove what was made
	rm -rf $(VENV) build dist demo-out bench-out .mypy_cache .pytest_cache .ruff_cache .hypothesis
