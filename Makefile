# The reward-model book. `make` lists what it can do.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
PRESET ?= default
BIN := $(VENV)/bin
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help env book test unit lint lab bench notebooks clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

env: $(VENV)/installed  ## make the environment in .venv

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all]'
	touch $@

book: env  ## set up, then regenerate every figure (PRESET=default)
	$(BIN)/snakemake --cores all --quiet rules --rerun-incomplete --nolock --config preset=$(PRESET)

test: lint unit book  ## check the code, the default run and its notebooks cell by cell, and the paths on people's data
	$(BIN)/python -m pytest tests/test_kills.py
	$(BIN)/python -m pytest --nbval-lax --nbval-current-env -p no:cacheprovider notebooks
	@for one in ukp_convarg1=smoke_convarg hh_harmless_test=smoke_hh; do \
	  if [ -d "$${RMLIB_DATA:-data}/$${one%=*}" ]; then $(MAKE) book PRESET=$${one#*=} || exit 1; \
	  else echo "$${one%=*} is not in $${RMLIB_DATA:-data}: preset $${one#*=} was not run"; fi; done

unit: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --ignore tests/test_kills.py

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lab: env  ## open the book in JupyterLab
	$(BIN)/jupyter lab notebooks

bench: env  ## race TRL's RewardTrainer and its last PPOTrainer, time a step, into docs/race (half an hour after `make book`; a quiet machine)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 $(BIN)/python docs/race/race.py
	CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 $(BIN)/python docs/race/steps.py
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/trl-1.12.0 trl==1.12.0
	PYTHONPATH=$(VENV)/trl-1.12.0 CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 $(BIN)/python docs/race/ppo_race.py

notebooks: env  ## run the default preset, keep its outputs in notebooks/ and README.md
	$(BIN)/python -m rmlib.notebooks refresh
	$(BIN)/python -m rmlib.claims

clean:  ## forget all results (figures stay)
	rm -rf results .snakemake
