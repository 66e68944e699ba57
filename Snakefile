"""Heavy stages side by side, then the six notebooks or the sweep's table, which find all stored.

    snakemake --cores 2 --config params=params/fashion8.yaml              # everything
    snakemake stages --cores 2 --config params=params/fashion8.yaml       # without notebooks
    snakemake --cores 2 --config sweep=params/sweeps/techniques.yaml      # a sweep

Order, parallel jobs and clusters are Snakemake's (params/profiles). A job is a group of stages in one
process; its outputs are the store's own records of whatever is missing, so what exists is never
made again. `time=2 memory=2` in the config ask for twice the run time and memory of every job.
"""

import json
import os
import re
import sys
from pathlib import Path

from deme_lib.experiment import parameters, sweeps
from deme_lib.experiment.store import CALL_S, RECORD, STEP_S, Store, rates, versions

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
ASKED = list(NOTEBOOKS)
if P.seed not in {q.seed for _, q in PLAN.values()}:  # recorded: 01 to 04 would make it again
    ASKED = [name for name in NOTEBOOKS if name[:2] in ("05", "06")]
STEPS = {"01": ("data", "baseline", "acceptance", "look-baseline"), "02": ("plain-", "deme-", "all_plain"),
         "03": ("look-", "search-"), "04": ("evaluate",), "05": ("",), "06": ("",)}
"""Notebook -> jobs that it waits for, by how their names begin."""
REMEDIES = {
    "sbatch: (command )?not found|configuration source|contact slurm controller": (
        "no scheduler is reached from here: PROFILE=params/profiles/local runs on this machine"
    ),
    "nvalid partition": "set slurm_partition in the profile to a partition that `sinfo` lists",
    "OUT_OF_MEMORY": "a job asked for too little mem_mb: add memory=2 to --config",
    "TIMEOUT": "a job asked for too short a runtime: add time=2 to --config",
}
"""What a scheduler says -> what to change; Snakemake names the rule and its resources above."""

os.environ.setdefault("OMP_NUM_THREADS", str(P.usable_threads))
VERSIONS = json.dumps(versions())
if os.environ.setdefault("DEME_VERSIONS", VERSIONS) != VERSIONS:
    raise WorkflowError(
        f"this worker has {VERSIONS}, the run was started with {os.environ['DEME_VERSIONS']}: give "
        "both one environment (a shared .venv, or LOCKED=1 on each; `container-image` on Kubernetes)"
    )


envvars:
    "DEME_VERSIONS",


onerror:
    told = "".join(Path(path).read_text() for path in log)
    for remedy in [remedy for said, remedy in REMEDIES.items() if re.search(said, told)]:
        print(f"{remedy}. What was made is kept: run the same command again to go on", file=sys.stderr)


def job_of(recipe):
    """Its group; a job of its own if it takes more than about ten minutes of a core."""
    large = recipe.training_steps * STEP_S + recipe.denoiser_calls * CALL_S > 600
    return f"{recipe.job}-{recipe.name}" if large else recipe.job


def records(recipes):
    return [str(STORE.folder(recipe) / RECORD) for recipe in recipes]


JOBS = {}
for recipe, _ in PLAN.values():
    JOBS.setdefault(job_of(recipe), []).append(recipe)
MISSING = {job: [r for r in found if not STORE.holds(r)] for job, found in JOBS.items()}


def upstream(job):
    """Records that a job reads and others make."""
    found = {r.name: r for recipe in MISSING[job] for r in recipe.inputs.values()}
    found = {name: r for name, r in found.items() if job_of(r) != job}
    if any(recipe.stage == "finetune" for recipe in MISSING[job]):  # the metric is judged first
        found |= {r.name: r for r, q in PLAN.values() if r.stage == "acceptance"}
    return records(found.values())


def jobs_before(notebook):
    return [r for job in JOBS if job.startswith(STEPS[notebook[:2]]) for r in records(JOBS[job])]


DATA = next((r.name for r, _ in PLAN.values() if r.stage == "data"), "")  # none: all is recorded
STEP, CALL = rates(STORE, DATA)
THREADS, GPUS = P.threads * P.processes, P.processes * (P.device == "cuda")


def memory(recipes=()):
    """MB of a job: 1.0 GB measured for most, 4.1 GB with precision and recall of fashion8."""
    images = P.train_images + P.search_images + P.test_images + P.samples
    found = 1500e6 + images * 9 * (P.image_size or 32) ** 2
    if any(recipe.stage == "metrics" for recipe in recipes):
        found += 32 * min(P.train_images, 10_000) ** 2  # distances, see metrics.precision_recall
        found += images * 50_000 * (P.features == "inception")
    return more_each_attempt(P.processes * found / 1e6 * float(config.get("memory", 1)))


def runtime(recipes=()):
    """Minutes of a job: four times what its steps and calls took in earlier records."""
    work = sum(r.training_steps * STEP + r.denoiser_calls * CALL for r in recipes)
    return more_each_attempt((30 + 4 * work / 60) * float(config.get("time", 1)))


def more_each_attempt(need):
    """A job that was killed for want of it asks for twice as much, then for three times."""
    return lambda wildcards, attempt: round(need * attempt)


rule all:
    input:
        f"{EXECUTED}/sweep.done" if IS_SWEEP else [f"{EXECUTED}/{name}.ipynb" for name in ASKED],


rule stages:
    input:
        [path for found in JOBS.values() for path in records(found)],


for job, missing in MISSING.items():

    rule:
        name:
            f"make_{job.replace('-', '_').replace('.', '_')}"
        input:
            upstream(job),
        output:
            records(missing),
        params:
            names=[r.name for r in missing or JOBS[job]],  # none: started again by a scheduler
        threads: THREADS
        resources:
            mem_mb=memory(missing),
            runtime=runtime(missing),
            gpu=GPUS,
        priority: sum(r.training_steps + r.denoiser_calls // 1000 for r in missing)
        shell:
            "{PYTHON} -m deme_lib make {params.names:q} -f {PARAMS:q}"


rule sweep:
    input:
        [path for found in JOBS.values() for path in records(found)],
    output:
        touch(f"{EXECUTED}/sweep.done"),
    threads: THREADS
    resources:
        mem_mb=memory(),
        runtime=runtime(),
        gpu=GPUS,
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
        threads: THREADS
        resources:
            mem_mb=memory(),
            runtime=runtime(),
            gpu=GPUS,
        retries: 1  # parallel kernels can race for ports
        shell:
            "{PYTHON} -m papermill --no-progress-bar --log-level ERROR {input.notebook} {output} "
            "-f {input.file:q} -p figures_dir {FIGURES:q}"
