# Everything runs from .venv, which is made on first use and again whenever pyproject.toml or constraints.txt changes.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: venv quickstart test lint typecheck format

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(STAMP)

quickstart: venv
	$(BIN)/lightning-ted fit --config configs/quickstart.yaml

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: venv
	$(BIN)/mypy

# Two files at a time: the tests of one share its processes.
test: lint typecheck
	$(BIN)/python -m pytest -n 2 --dist loadfile

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
