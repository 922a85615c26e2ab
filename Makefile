# make demo: install, export, run on a video file. make test: install, run all checks.
VENV ?= .venv
PYTHON ?= python3
# Processes that run tests, of one thread each; 0: all in pytest's own.
WORKERS ?= 2
BIN := $(VENV)/bin
# A checkout's folder may have any name; mypy and pytest see the package under its own.
NAMED := build/named

.PHONY: demo test lint types unit clean

demo: $(VENV)/installed
	$(BIN)/framestep demo --output out/demo

test: lint types unit

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/installed
	mkdir -p $(NAMED) && ln -sfn "$(CURDIR)" $(NAMED)/framestep
	cd $(NAMED) && "$(abspath $(BIN))/mypy" --config-file "$(CURDIR)/pyproject.toml" --cache-dir "$(CURDIR)/.mypy_cache" \
	    -p framestep.runtime -p framestep.export -p framestep.apps -p framestep.kernels -p framestep.calibration

unit: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -c pyproject.toml --rootdir=tests -n $(WORKERS) --dist loadfile \
	    --no-loadscope-reorder tests

# torch first: pinned, it is the build that pip finds for this machine, and nothing later pulls in another
$(VENV)/installed: pyproject.toml constraints.txt setup.py include/framestep.h $(wildcard runtime/native/*.cpp runtime/native/*.h runtime/native/*.inc)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "$(PYTHON) is Python %d.%d," % sys.version_info[:2] + \
	    " framestep needs 3.11 or later: name one, as in PYTHON=python3.12 make demo")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable ".[cpu,export,bench,triton,dev]"
	touch $@

clean:
	rm -rf $(VENV) build out *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
