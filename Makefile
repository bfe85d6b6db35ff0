# Every target sets up what it needs: a virtual environment in .venv, dependencies as pinned, the project itself.
PYTHON ?= python3
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: train test test-slow check clean

train: $(VENV)/installed
	deepspeed $$(python -m trainer ranks) launch/train.py

test: $(VENV)/installed
	python -m pytest -m "not slow"

test-slow: $(VENV)/installed
	python -m pytest -m slow

check: $(VENV)/installed
	ruff check .

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs
