# `make` lists what there is. Everything runs in .venv, which is made when it is missing and filled
# again only when pyproject.toml or constraints.txt changes.
# More arguments go in ARGS: make test ARGS="-x tests/test_solvers.py", make lab ARGS=--no-browser

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.installed
# The same bounds as in pyproject.toml, where pip's own message would be hard to read.
CHECK := import sys; (3, 10) <= sys.version_info < (3, 14) or sys.exit("Python 3.10 to 3.13 is \
  needed, and this is " + sys.version.split()[0] + ": choose one with PYTHON=python3.12")
LESSONS := $(sort $(wildcard notebooks/*/*.ipynb))
# Lesson 00 is opened first; all others are in the side bar.
FIRST := $(firstword $(LESSONS))

.PHONY: help install lab test lint demo notebooks assignments grade clean distclean
.DEFAULT_GOAL := help

help:  ## List these commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' Makefile

install: $(READY)  ## Make .venv and install everything into it

# A .venv without pip is what is left when making it failed half-way: it is made again.
$(READY): pyproject.toml constraints.txt
	$(PY) -m pip --version >/dev/null 2>&1 || { $(PYTHON) -c '$(CHECK)' && $(PYTHON) -m venv $(VENV); }
	$(PY) -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

lab: $(READY)  ## Open the lessons in JupyterLab
	$(PY) -m jupyterlab --ServerApp.root_dir=notebooks $(FIRST) $(ARGS)

test: export HF_HUB_OFFLINE = 1
test: $(READY)  ## Run all tests and every lesson; needs no network
	$(PY) -m pytest --nbval --nbval-current-env $(ARGS)

lint: $(READY)  ## Check the style of the code and of the lessons
	$(PY) -m ruff check $(ARGS)

demo: $(READY)  ## Run all tasks of the shipped model; writes demo.png
	$(PY) -m minidiffuser demo $(ARGS)

notebooks: export HF_HUB_OFFLINE = 1
notebooks: $(READY)  ## Run every lesson again, and save it with what it shows
	$(PY) -m nbconvert --to notebook --execute --inplace --ExecutePreprocessor.timeout=600 \
	  --ExecutePreprocessor.record_timing=False --ExecutePreprocessor.store_widget_state=False \
	  $(LESSONS) $(ARGS)

assignments: $(READY)  ## Write the student versions of the lessons into classroom/release
	$(PY) -m minidiffuser classroom assignments $(ARGS)

grade: $(READY)  ## Grade classroom/submitted: feedback and grades.csv (docs/instructors.md)
	$(PY) -m minidiffuser classroom grade $(ARGS)

clean:  ## Remove caches and what was built; keeps .venv, runs/ and your notebooks
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
	rm -rf .pytest_cache .ruff_cache build dist demo.png

distclean: clean  ## Remove .venv as well
	rm -rf $(VENV)
