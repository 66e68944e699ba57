# make reproduce [SEEDS="0 1 2"]    training seed 0 (or those) of fashion8 again from the shipped
#                                   pretrained model, compared with the committed rows; all tables and
#                                   figures under runs/figures/. PARAMS=params/cifar.yaml: another
#                                   file, of which missing seeds are made, or those of SEEDS again
# make figures                      missing seeds, tables and figures into figures/, notebooks in place
# make test   make lint   make bench   make lab   make clean
# PROFILE=params/profiles/slurm runs the jobs on a cluster (params/README.md).
# LOCKED=1 installs the versions behind the committed figures (constraints.txt).
PYTHON ?= python3
PARAMS ?= params/fashion8.yaml
SEEDS ?= $(if $(filter fashion8 smoke,$(NAME)),0)
PROFILE ?= params/profiles/local
CORES ?= $(shell $(PYTHON) -c 'import os; print(os.cpu_count())')
BIN := .venv/bin
# elsewhere --cores would cap the threads of a job at those of this machine
SNAKEMAKE = $(BIN)/snakemake --profile $(PROFILE) $(if $(findstring local,$(PROFILE)),--cores $(CORES))
NAME = $(basename $(notdir $(PARAMS)))

export OMP_NUM_THREADS ?= 1
# tcmalloc, where it is installed (Debian: libtcmalloc-minimal4), trains a third faster than glibc
export LD_PRELOAD := $(firstword $(wildcard /usr/lib/*/libtcmalloc_minimal.so.4))

.PHONY: reproduce figures test lint bench lab clean

reproduce: .venv/installed
	$(SNAKEMAKE) --forcerun notebook --config params=$(PARAMS) seeds="$(SEEDS)"
	@if [ -n "$(SEEDS)" ] && [ -d figures/$(NAME)/records ]; then $(BIN)/python -m deme_lib compare \
		figures/$(NAME)/records runs/figures/$(NAME)/records --seeds $(SEEDS); \
	else echo "nothing was compared: SEEDS is empty, or there is no figures/$(NAME)/records"; fi

figures: .venv/installed
	$(SNAKEMAKE) jobs --config params=$(PARAMS) figures=figures
	$(BIN)/python -m deme_lib make -f $(PARAMS) -p figures_dir=figures
ifeq ($(NAME),fashion8)
	$(BIN)/python -m deme_lib render figures/fashion8 --page README.md
	$(BIN)/python -m deme_lib ladder figures/fashion8 figures/wider
	$(BIN)/python -m deme_lib notebooks
endif

test: .venv/installed lint
	$(BIN)/python -m pytest -n $(CORES) --dist worksteal

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/installed
	$(BIN)/python tests/benchmarks/run.py

lab: .venv/installed
	$(BIN)/jupyter lab --notebook-dir=. notebooks/01_baseline.ipynb

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("deme needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(if $(LOCKED),--constraint constraints.txt) --editable '.[dev]'
	touch $@

clean:
	rm -rf runs .snakemake
