"""Heavy stages side by side, then the six notebooks or the sweep's table, which find all stored.

    snakemake --cores 2 --config params=params/digits.yaml              # everything
    snakemake artefacts --cores 2 --config params=params/digits.yaml    # without notebooks
    snakemake --cores 2 --config params=params/sweeps/techniques.yaml   # a sweep

Order, parallel jobs and clusters are Snakemake's. What a job made is in the store (runs/store);
the flags under runs/flags only tell Snakemake that it ran.
"""

import os
import sys
from pathlib import Path

from deme_lib import ROOT
from deme_lib.experiment import parameters, recipes, sweeps

PARAMS = config.get("params", "params/digits.yaml")
SWEEP = sweeps.load(PARAMS) if sweeps.is_sweep(PARAMS) else None
P = parameters.load(SWEEP.base if SWEEP else PARAMS)
FLAGS = f"{P.runs_dir}/flags"
os.environ.setdefault("OMP_NUM_THREADS", str(P.usable_threads))

ALONG_THE_WAY = ("data", "reference", "images-", "gradients", "task-vectors", "range-", "merged")
ALONG_THE_WAY += ("activations",)
"""Made within the jobs and notebooks that need them: seconds each, or used by one job only."""

PLAN = sweeps.plan(PARAMS)
JOBS = {name: r for name, (r, _) in PLAN.items() if not r.label.startswith(ALONG_THE_WAY)}
NOTEBOOKS = {path.stem: str(path) for path in sorted(Path("notebooks").glob("0*.ipynb"))}
STEPS = {"01": ("baseline", "acceptance"), "02": ("expert", "soup", "all-"),
         "03": ("search-", "plane", "landscape"), "04": ("metrics-",), "05": ("",), "06": ("",)}
PYTHON = f'"{sys.executable}"'


def flag(name):
    return f"{FLAGS}/{name}"


def upstream(recipe):
    """Flags of the nearest jobs that a recipe is made from."""
    found = set()
    for r in recipe.inputs.values():
        found |= {flag(r.name)} if r.name in JOBS else upstream(r)
    return found


def accepted(name):
    """No copy is trained before the metric was judged on the pretrained model."""
    recipe, p = PLAN[name]
    acceptance = recipes.acceptance(p).name
    return [flag(acceptance)] if recipe.stage == "finetune" and acceptance in JOBS else []


def jobs_before(notebook):
    return [flag(name) for name, r in JOBS.items() if r.label.startswith(STEPS[notebook[:2]])]


def done(notebook):
    return f"{FLAGS}/{P.folder_name()}/{notebook}"


rule all:
    input:
        done(f"sweep-{SWEEP.sweep}") if SWEEP else [done(notebook) for notebook in NOTEBOOKS],


rule artefacts:
    input:
        [flag(name) for name in JOBS],


rule sweep:
    input:
        [flag(name) for name in JOBS],
    output:
        touch(done(f"sweep-{SWEEP.sweep}" if SWEEP else "sweep")),
    params:
        file=PARAMS,
    shell:
        "{PYTHON} -m deme_lib sweep -f {params.file:q}"


for name, recipe in JOBS.items():

    rule:
        name:
            f"make_{name.replace('-', '_')}"
        input:
            upstream(recipe),
            accepted(name),
        output:
            touch(flag(name)),
        params:
            name=name,
            file=PARAMS,
        threads: P.threads
        priority: recipe.training_steps + recipe.denoiser_calls // 1000
        shell:
            "{PYTHON} -m deme_lib make {params.name} -f {params.file:q}"


for name, path in NOTEBOOKS.items():

    rule:
        name:
            f"notebook_{name[:2]}"
        input:
            notebook=path,
            file=PARAMS,
            jobs=jobs_before(name),
            before=[done("05_evaluation")] if name.startswith("06") else [],
            library=[str(p.relative_to(ROOT)) for p in sorted((ROOT / "deme_lib").rglob("*.py"))],
        output:
            touch(done(name)),
        params:
            executed=f"{P.runs_dir}/{P.folder_name()}/{name}.ipynb",
        threads: P.threads
        retries: 1  # parallel kernels can race for ports
        shell:
            "mkdir -p $(dirname {params.executed:q}) && "
            "{PYTHON} -m papermill --no-progress-bar --log-level ERROR {input.notebook} {params.executed:q} "
            "-f {input.file:q}"
