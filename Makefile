# make reproduce [PARAMS=params/smoke.yaml] [CORES=2]   both ablations, from data to figures, compared
#                                                       with the committed records
# make figures [PARAMS=...]                             the same into figures/, seeds that are missing;
#                                                       make gallery then renders the notebooks there
# make sweep SWEEP=params/sweeps/techniques.yaml        one further table of the paper
# make check [PARAMS=...]                               what would stop a run, before it starts
# make test   make lint   make bench   make gallery   make readme   make lab   make clean
# PROFILE=params/profiles/slurm runs them on a cluster (params/README.md).
# LOCKED=1 installs the versions behind the committed figures (constraints.txt).
PYTHON ?= python3
PARAMS ?= params/fashion8.yaml
SWEEP ?= params/sweeps/techniques.yaml
FIGURES ?= runs/figures
PROFILE ?= params/profiles/local
CORES ?= $(shell $(PYTHON) -c 'import os; print(os.cpu_count())')
BIN := .venv/bin
# elsewhere --cores would cap the threads of a job at those of this machine
SNAKEMAKE = $(BIN)/snakemake --profile $(PROFILE) $(if $(findstring local,$(PROFILE)),--cores $(CORES))
NAME = $(basename $(notdir $(PARAMS)))

# tcmalloc, where it is installed (Debian: libtcmalloc-minimal4), trains a third faster than glibc
export LD_PRELOAD := $(firstword $(wildcard /usr/lib/*/libtcmalloc_minimal.so.4))

.PHONY: reproduce figures sweep check test lint bench gallery readme lab clean

reproduce: .venv/installed
	$(SNAKEMAKE) --config params=$(PARAMS) figures=runs/figures
	@if [ -d figures/$(NAME)/records ]; then \
		$(BIN)/python -m deme_lib reproduced figures/$(NAME)/records runs/figures/$(NAME)/records; \
	else echo "figures/$(NAME) holds no committed records to compare runs/figures/$(NAME) with"; fi

figures: .venv/installed
	$(SNAKEMAKE) --config params=$(PARAMS) figures=figures

sweep: .venv/installed
	$(SNAKEMAKE) --config sweep=$(SWEEP) figures=$(FIGURES)

check: .venv/installed
	$(BIN)/python -m deme_lib check -f $(PARAMS)

test: .venv/installed lint
	$(BIN)/python -m pytest -n $(CORES) --dist worksteal

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/installed
	$(BIN)/python tests/benchmarks/run.py

gallery: .venv/installed
	$(BIN)/python -m deme_lib gallery runs/committed/$(NAME) figures/$(NAME)

readme: .venv/installed
	$(BIN)/python tests/benchmarks/scale.py
	$(BIN)/python -m deme_lib readme README.md */README.md figures/*/README.md

lab: .venv/installed
	$(BIN)/jupyter lab --notebook-dir=. notebooks/01_baseline.ipynb

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("deme needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(if $(LOCKED),--constraint constraints.txt) --editable '.[dev]'
	touch $@

clean:
	rm -rf runs .snakemake
