# make demo: compile the bundled model for this machine and generate text with it.
# make test: format, lint, types, layers, tests. make test-gpu: the tests that a GPU runs, if there
# is one. make arm: what tests need to run programs on an emulated ARM machine; without, they skip.
# All set up a virtual environment first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

DEMO := build/demo
PROMPT ?= The first thing to know about

.PHONY: setup demo test test-gpu arm clean

setup: $(READY)

$(READY): constraints.txt pyproject.toml
	@echo "== setting up $(VENV): a few minutes, about 2 GB"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[export,rpc,test]'
	touch $@

demo: $(READY)
	@echo "== exporting the bundled model to ONNX"
	$(BIN)/mxcompile export models/tinylm -o $(DEMO)/tinylm.onnx
	@echo "== compiling it for this machine at 4.2 bits a weight"
	$(BIN)/mxcompile $(DEMO)/tinylm.onnx --target x86 --budget 4.2bit -o $(DEMO)/tinylm.mxc --force
	@echo "== generating text"
	$(BIN)/mxcompile run $(DEMO)/tinylm.mxc --prompt "$(PROMPT)" --temperature 0.7 --top-p 0.9

test: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -q -n logical --maxprocesses 8 --dist loadfile

test-gpu: $(READY)
	@if $(BIN)/python -c 'import sys; from mxcompile import gpu; sys.exit(not gpu.features())'; then \
		$(BIN)/pytest -q -m gpu tests; \
	else \
		echo "no CUDA device that targets are shipped for: GPU tests are not run"; \
	fi

arm: $(READY)
	$(BIN)/python scripts/setup_arm.py

clean:
	rm -rf build $(VENV)
