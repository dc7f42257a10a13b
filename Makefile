# make run    set up and run the main job: a table on the terminal, a bundle in runs/
# make quick  set up, then the tests that one runs while working
# make test   set up, then lint, types, import rules and the whole test suite
PYTHON ?= python3
VENV := .venv
# Processes of tests; they wait for half of the time, so that two cores keep three busy.
JOBS ?= 3
BIN := $(VENV)/bin

.PHONY: run test quick check clean

run: $(VENV)/.installed
	$(BIN)/ryot-deploy cluster-run $(ARGS)

test: check
	$(BIN)/python -m pytest --numprocesses $(JOBS)

quick: $(VENV)/.installed
	$(BIN)/python -m pytest --numprocesses $(JOBS) -m "not slow"

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
