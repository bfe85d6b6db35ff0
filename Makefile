# Every target sets up what it needs: a virtual environment in .venv, dependencies as pinned, the project itself.
PYTHON ?= python3
VENV := .venv
# Two ranks on the CPU; with GPUs one rank each: 1, 2, 4 or 8, by which the quick start's 32 sequences of 4 divide.
RANKS := import torch; n = torch.cuda.device_count(); print(f'--num_gpus {min(8, 2 ** (n.bit_length() - 1))}' if n else '--num_accelerators 2')
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: train test test-slow test-slurm check clean

train: $(VENV)/installed
	deepspeed $$(python -c "$(RANKS)") launch/train.py

test: $(VENV)/installed
	python -m pytest -m "not slow"

test-slow: $(VENV)/installed
	python -m pytest -m slow

test-slurm: $(VENV)/installed
	SLURM_TESTS=all python -m pytest -m slow tests/slurm

check: $(VENV)/installed
	ruff check .

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs
