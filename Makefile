# Every target sets up what it needs: a virtual environment in .venv, dependencies as pinned, the project itself.
PYTHON ?= python3
VENV := .venv
# Two ranks on the CPU; with GPUs one rank each: 1, 2, 4 or 8, by which the quick start's 32 sequences of 4 divide.
RANKS := import torch; n = torch.cuda.device_count(); print(f'--num_gpus {min(8, 2 ** (n.bit_length() - 1))}' if n else '--num_accelerators 2')
# Processes that run tests; each may start ranks of its own.
WORKERS ?= 2
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: train test test-slow test-slurm fuzz kills mutations check clean

train: $(VENV)/installed
	deepspeed --log_level error $$(python -c "$(RANKS)") launch/train.py

test: $(VENV)/installed
	python -m pytest -n $(WORKERS) --no-loadscope-reorder -m "not slow"

test-slow: $(VENV)/installed
	python -m pytest -n $(WORKERS) --no-loadscope-reorder -m slow

test-slurm: $(VENV)/installed
	SLURM_TESTS=all python -m pytest -m slow tests/slurm

# 2,000 configurations and command lines that nobody would write; other numbers: make fuzz CASES=500 SEED=7
fuzz: $(VENV)/installed
	python -m tests.config.fuzz --cases $(or $(CASES),2000) --seed $(or $(SEED),0)

# 60 kills of runs, seeded, at moments of their files and at times; KILLS=200 SEED=7 for others.
kills: $(VENV)/installed
	python -m tests.checkpoint.kills --kills $(or $(KILLS),60) --seed $(or $(SEED),0)

# Files of runs, deltas, caches and bases, damaged one at a time; CASES=1000 SEED=7 for others.
mutations: $(VENV)/installed
	python -m tests.mutations --cases $(or $(CASES),300) --seed $(or $(SEED),0)

check: $(VENV)/installed
	ruff check .
	ruff format --check --quiet .
	mypy

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs
