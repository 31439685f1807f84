# Each target prepares .venv by itself; `make setup` only does that. PYTHON names the interpreter, 3.11 or newer.
PYTHON ?= python3
# What `make execute` compiles for, sm_80, sm_90 or sm_100, all where empty; and K/N, the K-th of N parts of what is to be done.
TARGET ?=
SHARE ?= 1/1
# Which changes `make mutate` makes: the K-th of N parts.
PART ?= 1/1
BIN := .venv/bin
SOURCES := pyproject.toml setup.py constraints.txt

.PHONY: setup demo test slow execute mutate verify gpu bench report static notebooks docs dist lint format clean

setup: .venv/dev.done

.venv/python.done:
	$(PYTHON) -m venv .venv
	touch $@

# One stamp for each extra, so that a test run does not wait for the demo's model.
.venv/%.done: .venv/python.done $(SOURCES)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[$*]"
	touch $@

# timm without its dependencies: a torchvision made for CUDA does not load beside torch's CPU build, and where it lies
# transformers does not load either.
.venv/parity.done: .venv/dev.done
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[parity]"
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps timm
	touch $@

demo: .venv/demo.done
	$(BIN)/fastdsm demo

test: .venv/parity.done
	$(BIN)/python -m pytest tests -n auto --dist loadfile -m "not slow"

slow: .venv/dev.done .venv/release.done .venv/docs.done
	$(BIN)/python -m pytest tests -n auto --dist loadfile -m slow

execute: .venv/dev.done
	$(BIN)/python -m benchmarks.execution $(TARGET:%=--target %) --share $(SHARE)

mutate: .venv/bench.done .venv/dev.done
	$(BIN)/python -m benchmarks.mutation --part $(PART)

verify: .venv/dev.done
	$(BIN)/fastdsm verify

gpu: .venv/dev.done
	TRITON_INTERPRET=0 $(BIN)/python -m pytest tests/gpu -n 4
	$(BIN)/fastdsm verify --jobs 16

bench: .venv/bench.done
	$(BIN)/fastdsm bench

report: .venv/bench.done
	$(BIN)/python -m benchmarks.report

static: .venv/dev.done
	$(BIN)/python -m benchmarks.static

notebooks: .venv/dev.done
	$(BIN)/python -m examples.notebooks

docs: .venv/docs.done
	$(BIN)/mkdocs build --strict

dist: .venv/release.done
	rm -rf build dist *.egg-info
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

lint: .venv/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/dev.done
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist site *.egg-info
