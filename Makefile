# `make serve` and `make test` do all their own set-up; the rest is for developers.
PYTHON ?= python3
BIN := .venv/bin
MODEL ?= demo
ARGS ?=
URL ?= http://127.0.0.1:8000
SCENARIO ?= steady
DURATION ?= 60s
OUT ?= loadtest/results
JOBS ?= 2

.PHONY: serve test check loadtest sanitize gpu-table install clean

.venv/installed: pyproject.toml setup.py $(wildcard kernels/cpu/src/* cache/native/*.cpp cache/native/*.h)
	$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13) and "Foregate needs Python 3.10 to 3.13; name one with make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

install: .venv/installed

serve: .venv/installed
	$(BIN)/foregate serve $(MODEL) $(ARGS)

test: .venv/installed
	$(BIN)/foregate pull demo
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile $(ARGS)

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

loadtest: .venv/installed
	mkdir -p $(OUT)
	$(BIN)/python -m locust -f loadtest/locustfile.py --headless --only-summary --loglevel WARNING --host $(URL) \
	    --scenario $(SCENARIO) --duration $(DURATION) --html $(OUT)/$(SCENARIO).html --csv $(OUT)/$(SCENARIO) \
	    --result $(OUT)/$(SCENARIO).json $(ARGS)

sanitize: .venv/installed
	tests/kernels/sanitize.sh $(BIN)/python

gpu-table: .venv/installed
	env -u TRITON_INTERPRET $(BIN)/python -m kernels.gpu.aot

clean:
	rm -rf .venv
