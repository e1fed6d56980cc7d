# The map of commands. `make` alone prints it.

PYTHON ?= python3
PIP_ARGS ?=
LAB_ARGS ?=
TEST_ARGS ?=
BIN := .venv/bin
export PYTHON PIP_ARGS

.DEFAULT_GOAL := help
.PHONY: help lab test mutants check compile-check matrix format notebooks bench constraints setup clean

help:
	@echo 'make lab            set up, then open the course in JupyterLab'
	@echo 'make test           set up, then run every test and every notebook'
	@echo 'make mutants        plant every bug of tests/mutants/planted.txt; all must be caught'
	@echo 'make check          lint, format, types; notebooks and exercises in step with their sources'
	@echo 'make compile-check  compile every kernel for sm_80, sm_90, gfx942; compare with the stored table'
	@echo 'make matrix         the kernels interpreted on every triton we know'
	@echo 'make format         rewrite the code in the one format'
	@echo 'make notebooks      build the exercises and execute the notebooks whose sources changed'
	@echo 'make bench          time the ops on this machine'
	@echo 'make constraints    resolve constraints.txt anew in a fresh environment'
	@echo 'make setup          only build .venv (the others do it when needed)'
	@echo 'make clean          remove .venv and what tools left behind; my/ stays'
	@echo 'make help           print this map'
	@echo
	@echo 'PYTHON=python3.12           the interpreter that .venv is built from'
	@echo 'PIP_ARGS="..."              passed on to pip'
	@echo 'LAB_ARGS="--no-browser"     passed on to JupyterLab'
	@echo 'TEST_ARGS="-k delta"        passed on to pytest'

setup:
	@sh tools/setup.sh

lab: setup
	@sh tools/lab.sh $(LAB_ARGS)

test: setup
	@sh tools/test.sh $(TEST_ARGS)

mutants: setup
	$(BIN)/python -m pytest -n 2 --mutants tests/mutants $(TEST_ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python tools/notebooks.py --check
	$(BIN)/python -m gdr_teach.grading.build --check

compile-check: setup
	$(BIN)/python tools/compile_check.py

matrix: setup
	@sh tools/matrix.sh

format: setup
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

notebooks: setup
	$(BIN)/python -m gdr_teach.grading.build
	$(BIN)/python tools/notebooks.py

bench: setup
	$(BIN)/python benchmarks/run.py

constraints:
	$(PYTHON) tools/constraints.py

clean:
	rm -rf .venv .venv.unfinished build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
