PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test lint bench-overhead bench-logging bench-distill clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

setup: $(READY)

demo: $(READY)
	$(BIN)/python examples/demo.py --out demo

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench-overhead: $(READY)
	$(BIN)/python examples/benchmarks/overhead.py --peers-venv

bench-logging: $(READY)
	$(BIN)/python examples/benchmarks/logging_cost.py

bench-distill: $(READY)
	$(BIN)/python examples/benchmarks/distill.py

clean:
	rm -rf $(VENV) .venv-peers build dist *.egg-info demo
