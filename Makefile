# make setup | demo | test | check | bench | clean        (PYTHON=python3.12 make setup: with another Python, 3.11 or later)
PYTHON ?= python3
ASSETS ?= ../shared
BIN    := .venv/bin
STAMP  := .venv/.installed
TOOLS  := .venv/.installed-tools
LLAMA  := .venv/.installed-llama-cpp

.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench clean

help:
	@echo "make setup   install tersely into .venv, with the tools to develop it"
	@echo "make demo    compress the model in the package into demo-out, and show what it cost"
	@echo "make test    run the tests (ASSETS=PATH: trained models and texts, if you have them)"
	@echo "make check   lint, formatting, types"
	@echo "make bench   run the benchmarks that need nothing but tersely and the assets"
	@echo "make clean   remove what these made, the environment included"

setup: $(TOOLS)

# PyTorch first: a build for this machine that is at hand (CPU, CUDA) is then kept.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable .
	touch $@

$(TOOLS): $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(STAMP)
	rm -rf demo-out demo-out.partial demo-out-report.html demo-out-report.json
	$(BIN)/tersely demo --out demo-out

# For any x86-64 of the last ten years (v3), not for this one only; without what its Python package does not use.
# Needs a C++ compiler. Where it cannot be built, the tests that run it are skipped.
$(LLAMA): $(TOOLS)
	@echo "building llama.cpp for the tests: three minutes on two cores"
	@CMAKE_ARGS='-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF -DCMAKE_PROJECT_llama_cpp_INCLUDE="$(CURDIR)/tests/llama_cpp.cmake"' \
	SKBUILD_BUILD_TARGETS=llama \
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[llama-cpp]' \
	&& touch $@ || echo "llama.cpp cannot be built here: the tests that run it will be skipped"

# A process for each core, up to four, of one thread each: tests are small.
test: setup $(LLAMA)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --assets="$(ASSETS)" --numprocesses=logical --maxprocesses=4 --dist=worksteal

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: setup
	@set -e; for script in benchmarks/bench_*.py; do \
		[ -e "$$script" ] || { echo "no benchmarks/bench_*.py"; break; }; \
		echo "== $$script"; $(BIN)/python "$$script" --assets "$(ASSETS)"; \
	done

clean:
	rm -rf .venv demo-out demo-out.partial demo-out-report.html demo-out-report.json build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
