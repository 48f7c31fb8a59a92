# Two commands for a fresh machine: `make demo` and `make test`. Both make the environment first, in .venv.
# One for a machine with a GPU: `make gpu`, in the Python that is there; it makes no environment and downloads nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# oracles of the tests and photos of the demo, whose own dependencies are heavy and not needed
NO_DEPS := dall-e==0.1 sporco==0.2.2.post1

.PHONY: env demo test test-long gpu check format clean

env: $(VENV)/.made

$(VENV)/.made: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "constraints.txt wants Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[gpu,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(NO_DEPS)
	touch $@

demo: env
	$(BIN)/fastbeit demo --out runs/demo $(if $(DATA),--data '$(DATA)')

test: env
	$(BIN)/python -m pytest -m 'not long'

test-long: env
	$(BIN)/python -m pytest -m long

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
	rm -rf $(VENV) runs dist .pytest_cache .ruff_cache
