# Every target sets up what it needs: a virtual environment with the pinned packages of constraints.txt.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: setup demo check test test-containers bench-queue bench-engine bench-lockstep bench-plan bench-faults clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/python demo/demo.py

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: $(STAMP)
	$(BIN)/pytest --numprocesses 2 --dist worksteal

test-containers: $(STAMP)
	$(BIN)/pytest -s tests/containers/live.py

bench-queue: $(STAMP)
	$(BIN)/python benchmarks/bench_queue.py

bench-engine: $(STAMP)
	$(BIN)/python benchmarks/bench_engine.py

bench-lockstep: $(STAMP)
	$(BIN)/python benchmarks/bench_lockstep.py

bench-plan: $(STAMP)
	$(BIN)/python benchmarks/bench_plan.py

bench-faults: $(STAMP)
	$(BIN)/python benchmarks/bench_faults.py

clean:
	rm -rf $(VENV) build dist *.egg-info src/*.egg-info
