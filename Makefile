# Two commands for a fresh machine: `make demo` and `make test`. Both make the environment first, in .venv.
# One for a machine with a GPU: `make gpu`, in the Python that is there; it makes no environment and downloads nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# the oldest PyTorch and Triton that fastbeit runs on
FLOOR ?= .venv-floor
FLOOR_PINS := torch==2.11.0 triton==3.6.0
# peers that are not in the environment of the tests: timm wants torchvision, which wants a PyTorch of its own
TIMM ?= .venv-timm
TIMM_PINS := torch==2.14.1 torchvision==0.29.1 timm==1.0.31 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0
PIP := -m pip install --quiet --disable-pip-version-check
# oracles of the tests and photos of the demo, whose own dependencies are heavy and not needed
NO_DEPS := dall-e==0.1 sporco==0.2.2.post1
CHECK_PYTHON := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and "Python 3.11 to 3.13 is wanted; set PYTHON=")

# a process a core, each with one thread; the tests of a file stay together, and share what they made
IN_PARALLEL := -n auto --maxprocesses 8 --dist loadfile

.PHONY: env demo test test-long test-floor test-timm gpu check format clean

env: $(VENV)/.made

$(VENV)/.made: pyproject.toml constraints.txt
	$(PYTHON) -c '$(CHECK_PYTHON)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) -c constraints.txt -e '.[gpu,dev]'
	$(BIN)/python $(PIP) --no-deps $(NO_DEPS)
	touch $@

demo: env
	$(BIN)/fastbeit demo --out runs/demo $(if $(DATA),--data '$(DATA)')

test: env
	$(BIN)/python -m pytest -m 'not long and not timm' $(IN_PARALLEL)

test-long: env
	$(BIN)/python -m pytest -m long

# downloads PyTorch with CUDA, 5.5 GB once installed; of several Pythons each wants an environment of its own: FLOOR=
test-floor: $(FLOOR)/.made
	$(FLOOR)/bin/python -m pytest -m 'not long and not timm' $(IN_PARALLEL)

$(FLOOR)/.made: pyproject.toml constraints.txt
	$(PYTHON) -c '$(CHECK_PYTHON)'
	$(PYTHON) -m venv $(FLOOR)
	{ grep -vE '^(torch|triton)==' constraints.txt; printf '%s\n' $(FLOOR_PINS); } > $(FLOOR)/constraints.txt
	$(FLOOR)/bin/python $(PIP) -c $(FLOOR)/constraints.txt -e '.[gpu,dev]'
	$(FLOOR)/bin/python $(PIP) --no-deps $(NO_DEPS)
	touch $@

# timm and onnxruntime with what `fastbeit export` writes; downloads PyTorch with CUDA, 5.5 GB once installed
test-timm: $(TIMM)/.made
	$(TIMM)/bin/python -m pytest -m timm tests/weights/test_timm.py tests/weights/test_onnx.py

$(TIMM)/.made: pyproject.toml constraints.txt Makefile
	$(PYTHON) -c '$(CHECK_PYTHON)'
	$(PYTHON) -m venv $(TIMM)
	{ grep -vE '^(torch|triton|torchvision)==|nvidia' constraints.txt; printf '%s\n' $(TIMM_PINS); } > $(TIMM)/constraints.txt
	$(TIMM)/bin/python $(PIP) -c $(TIMM)/constraints.txt -e '.[export]' $(TIMM_PINS) pytest
	touch $@

gpu:
	PYTHONPATH=.:kernels $(PYTHON) -m benchmarks.gpu $(PARTS)

check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(FLOOR) $(TIMM) runs dist .pytest_cache .ruff_cache
