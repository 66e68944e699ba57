# make reproduce [PARAMS=params/smoke.yaml] [CORES=2]   both ablations, from data to figures
# make sweep SWEEP=params/sweeps/techniques.yaml         one further table of the paper
# make check [PARAMS=...]                               what would stop that, before it starts
# make test   make lint   make readme   make lab   make clean
PYTHON ?= python3
PARAMS ?= params/digits.yaml
CORES ?= $(shell $(PYTHON) -c 'import os; print(os.cpu_count())')
BIN := .venv/bin
SWEEP ?= params/sweeps/techniques.yaml
SNAKEMAKE := $(BIN)/snakemake --cores $(CORES) --nolock \
	--rerun-incomplete --rerun-triggers mtime --quiet rules reason host

.PHONY: reproduce sweep check test lint readme lab clean

reproduce: .venv/installed
	$(SNAKEMAKE) --forcerun notebook_06 --config params=$(PARAMS)

sweep: .venv/installed
	$(SNAKEMAKE) --forcerun sweep --config params=$(SWEEP)

check: .venv/installed
	$(BIN)/python -m deme_lib check -f $(PARAMS)

test: .venv/installed lint
	$(BIN)/python -m pytest -n $(CORES) --dist worksteal

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

readme: .venv/installed
	$(BIN)/python -m deme_lib readme figures/digits

lab: .venv/installed
	$(BIN)/jupyter lab --notebook-dir=. notebooks/01_baseline.ipynb

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("deme needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf runs .snakemake
