# The commands of this project. `make` alone lists them.
.DEFAULT_GOAL := help
.PHONY: help setup native demo docs test check bench soak clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1	/' | expand -t 10

setup: $(STAMP)  ## virtual environment in .venv with everything pinned, native kernels built

$(STAMP): pyproject.toml constraints.txt setup.py scripts/setup.sh $(wildcard mm_rec/cpp/*.py mm_rec/cpp/src/* mm_rec/cpp/cuda/*)
	PYTHON=$(PYTHON) sh scripts/setup.sh $(VENV)
	@touch $@

native: setup  ## rebuild the native kernels by hand
	cd mm_rec/cpp && ../../$(BIN)/python setup.py build_ext --inplace

demo: setup  ## data, training and a model that answers questions, in 20 minutes and 1 GB
	$(BIN)/mm-rec demo

docs: setup  ## this documentation as a site in site/, for a browser; no network is needed
	$(BIN)/python -m mkdocs --quiet build --strict
	@echo "site/index.html is the first page; for the search: $(BIN)/python -m http.server --directory site"

test: setup  ## the whole test suite, in two processes
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: setup  ## lint, format, types, doctests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q --doctest-modules mm_rec --ignore mm_rec/system/windows.py -p no:cacheprovider

bench: setup  ## speed of this machine: training step, kernels, limits
	$(BIN)/mm-rec bench

soak: setup  ## try the promises of docs/reliability.md for hours (ROW=n, SECONDS=n); goes on where it was
	$(BIN)/python tests/faults/soak.py $(if $(ROW),--row $(ROW)) $(if $(SECONDS),--seconds $(SECONDS))

clean:  ## remove what setup and the build made (no data, no runs)
	rm -rf $(VENV) build site *.egg-info mm_rec/cpp/build
	find mm_rec \( -name '*.so' -o -name '*.dylib' \) -delete
