"""Heavy stages side by side, then the six notebooks or the sweep's table, which find all stored.

    snakemake --cores 2 --config params=params/fashion8.yaml              # everything
    snakemake stages --cores 2 --config params=params/fashion8.yaml       # without notebooks
    snakemake --cores 2 --config sweep=params/sweeps/techniques.yaml      # a sweep

Order, parallel jobs and clusters are Snakemake's. A job is a group of stages in one process; its
outputs are the store's own records of whatever is missing, so what exists is never made again.
"""

import os
import sys
from pathlib import Path

from deme_lib.experiment import parameters, sweeps
from deme_lib.experiment.store import RECORD, Store

IS_SWEEP = "sweep" in config
SWEEP = sweeps.load(config["sweep"]) if IS_SWEEP else None
PARAMS = config["sweep"] if IS_SWEEP else config.get("params", "params/fashion8.yaml")
FIGURES = config.get("figures", "runs/figures")
BASE = SWEEP.base if IS_SWEEP else PARAMS
P = parameters.load(BASE, figures_dir=FIGURES)
PLAN = sweeps.plan(PARAMS, recorded=False, figures_dir=FIGURES)
STORE = Store(P.runs_dir)
NAME = SWEEP.sweep if IS_SWEEP else parameters.folder_name(P)
EXECUTED = f"{P.runs_dir}/{NAME}" if FIGURES == "runs/figures" else f"{P.runs_dir}/committed/{NAME}"
PYTHON = f'"{sys.executable}"'
NOTEBOOKS = {path.stem: str(path) for path in sorted(Path("notebooks").glob("0*.ipynb"))}
if P.seed not in {q.seed for _, q in PLAN.values()}:  # recorded: 01 to 04 would make it again
    NOTEBOOKS = {name: path for name, path in NOTEBOOKS.items() if name[:2] in ("05", "06")}
STEPS = {"01": ("data", "baseline", "acceptance", "look-baseline"), "02": ("plain-", "deme-", "all_plain"),
         "03": ("look-", "search-"), "04": ("evaluate",), "05": ("",), "06": ("",)}
"""Notebook -> jobs that it waits for, by how their names begin."""

os.environ.setdefault("OMP_NUM_THREADS", str(P.usable_threads))


def record(recipe):
    return str(STORE.folder(recipe) / RECORD)


JOBS, RECORDS = {}, {}
for recipe, _ in PLAN.values():
    RECORDS.setdefault(recipe.job, []).append(record(recipe))
    if not STORE.holds(recipe):
        JOBS.setdefault(recipe.job, []).append(recipe)


def upstream(job):
    """Records that a job reads and others make."""
    found = {record(r) for recipe in JOBS[job] for r in recipe.inputs.values() if r.job != job}
    if any(recipe.stage == "finetune" for recipe in JOBS[job]):
        found |= set(RECORDS.get(f"acceptance-{P.seed}", ()))  # no copy before the metric was judged
    return sorted(found)


def jobs_before(notebook):
    return [r for job, found in RECORDS.items() if job.startswith(STEPS[notebook[:2]]) for r in found]


rule all:
    input:
        f"{EXECUTED}/sweep.done" if IS_SWEEP else [f"{EXECUTED}/{name}.ipynb" for name in NOTEBOOKS],


rule stages:
    input:
        [path for found in RECORDS.values() for path in found],


for job, recipes_of_job in JOBS.items():

    rule:
        name:
            f"make_{job.replace('-', '_').replace('.', '_')}"
        input:
            upstream(job),
        output:
            [record(recipe) for recipe in recipes_of_job],
        params:
            job=job,
        threads: P.threads
        resources:
            mem_mb=2000,
            runtime=120,
        priority: sum(r.training_steps + r.denoiser_calls // 1000 for r in recipes_of_job)
        shell:
            "{PYTHON} -m deme_lib make {params.job:q} -f {PARAMS:q}"


rule sweep:
    input:
        [path for found in RECORDS.values() for path in found],
    output:
        touch(f"{EXECUTED}/sweep.done"),
    shell:
        "{PYTHON} -m deme_lib sweep -f {PARAMS:q} --figures {FIGURES:q}"


for name, path in NOTEBOOKS.items():

    rule:
        name:
            f"notebook_{name[:2]}"
        input:
            notebook=path,
            file=BASE,
            jobs=jobs_before(name),
            before=[f"{EXECUTED}/05_evaluation.ipynb"] if name.startswith("06") else [],
            library=[str(p) for p in sorted(Path("deme_lib").rglob("*.py"))],
        output:
            f"{EXECUTED}/{name}.ipynb",
        threads: P.threads
        retries: 1  # parallel kernels can race for ports
        shell:
            "{PYTHON} -m papermill --no-progress-bar --log-level ERROR {input.notebook} {output} "
            "-f {input.file:q} -p figures_dir {FIGURES:q}"
