# make demo: the environment, then the main job.   make test: the environment, then the tests.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check fuzz real walk clean

demo: $(VENV)/.ready
	$(BIN)/headstart demo --out demo

# worksteal: neighbouring tests run in one process, which makes their fixtures once.
test: $(VENV)/.ready-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

check: $(VENV)/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Every architecture of transformers through every transfer method: writes benchmarks/results/architectures.md.
walk: $(VENV)/.ready-test
	$(BIN)/python -m benchmarks.architectures

# torch first, as pinned: a bare range downloads gigabytes of CUDA packages on a machine without a GPU.
$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.ready-test: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[peft,eval,sentencepiece,dev]"
	touch $@

# Damaged files and killed commands with fresh seeds, for as long as one likes.
MINUTES ?= 30
fuzz: $(VENV)/.ready-test
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --minutes $(shell expr $(MINUTES) \* 2 / 3)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.kills --kills 100000 --minutes $(shell expr $(MINUTES) / 4 + 1)
	OMP_NUM_THREADS=1 HEADSTART_FUZZ_HUB=$(shell expr $(MINUTES) \* 20) HEADSTART_FUZZ_SEED=$(shell date +%s) \
		$(BIN)/python -m pytest -q tests/fuzz/test_lying_hub.py -k random

# Two really trained models of 135 and 270 million parameters as donors: 0.35 GB to download, 1.2 GB in build/real.
real: $(VENV)/.ready-test
	$(BIN)/python -m benchmarks.real.fetch build/real
	$(BIN)/headstart zoo add build/real/*.gguf --zoo build/real/zoo
	HEADSTART_REAL=build/real OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m real

clean:
	rm -rf $(VENV) build dist *.egg-info
