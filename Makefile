# make demo   the whole path on a real model, at most 20 minutes on two cores
# make test   quick and slow tests
# make lint   ruff and mypy
# make quick  the quick tests alone, under three minutes
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
DEMO   ?=

.PHONY: demo test quick lint format clean

# Bytecode is compiled when a module is first imported, not for every module that is installed.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

# A changed pyproject or constraints file means a fresh install; anything else reuses the environment.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL) -e ".[dev]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/dapt-merge demo $(DEMO)

test: $(VENV)/.installed-dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 -m "not slow"
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 -m slow

quick: $(VENV)/.installed-dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 -m "not slow"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
