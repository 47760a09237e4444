# make demo and make test do all the set-up on a fresh machine with Python 3.11+, make and a C compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: venv demo test test-all lint bench clean
venv: $(STAMP)

# torch first and pinned: later installs then find it and do not fetch another build.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $(STAMP)

demo: venv
	rm -rf demo-output
	$(BIN)/python -m jobs.transcribe --input tests/data/prompts/prompts.jsonl --output demo-output --model tests/data/tiny-en
	$(BIN)/python -m jobs.show demo-output

# Two files of tests at a time: half of the time of one is waiting, for Ray to start and for what was killed. The long
# files first, so that no worker is left with them at the end.
test: venv
	$(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist loadfile --no-loadscope-reorder \
		tests/faults tests/jobs tests/parity tests/core

test-all: venv
	$(BIN)/python -m pytest

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: venv
	$(BIN)/python tests/bench/bench_features.py
	$(BIN)/python tests/bench/bench_engine.py --quick
	$(BIN)/python tests/bench/bench_transcribe.py

clean:
	rm -rf demo-output build *.egg-info .pytest_cache .ruff_cache .hypothesis
