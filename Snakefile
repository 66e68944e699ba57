"""Heavy stages side by side, then the six notebooks, which find everything stored.

    snakemake --cores 2 --config params=params/digits.yaml              # everything
    snakemake artefacts --cores 2 --config params=params/digits.yaml    # without notebooks

Order, parallel jobs and clusters are Snakemake's. What a job made is in the store (runs/store);
the flags under runs/flags only tell Snakemake that it ran.
"""

import os
import sys
from pathlib import Path

from deme_lib import ROOT, parameters, recipes

PARAMS = config.get("params", "params/digits.yaml")
P = parameters.load(PARAMS)
FLAGS = f"{P.runs_dir}/flags"
os.environ.setdefault("OMP_NUM_THREADS", str(P.threads))

ALONG_THE_WAY = ("data", "reference", "images-", "gradients", "task-vectors", "range-", "merged")
"""Made within the jobs and notebooks that need them: seconds each, or used by one job only."""

RECIPES = recipes.everything(P)
JOBS = {label: r for label, r in RECIPES.items() if not label.startswith(ALONG_THE_WAY)}
NOTEBOOKS = {path.stem: str(path) for path in sorted(Path("notebooks").glob("0*.ipynb"))}
STEPS = {"01": ("baseline", "acceptance"), "02": ("expert", "soup", "all-"),
         "03": ("search-", "plane"), "04": ("metrics-",), "05": ("",), "06": ("",)}
PYTHON = f'"{sys.executable}"'


def flag(label):
    return f"{FLAGS}/{JOBS[label].name}"


def upstream(recipe):
    """Flags of the nearest jobs that a recipe is made from."""
    found = set()
    for r in recipe.inputs.values():
        found |= {flag(r.label)} if r.label in JOBS else upstream(r)
    return found


def jobs_before(notebook):
    return [flag(label) for label in JOBS if label.startswith(STEPS[notebook[:2]])]


def done(notebook):
    return f"{FLAGS}/{P.folder_name()}/{notebook}"


rule all:
    input:
        [done(notebook) for notebook in NOTEBOOKS],


rule artefacts:
    input:
        [flag(label) for label in JOBS],


for label, recipe in JOBS.items():

    rule:
        name:
            f"make_{label.replace('-', '_')}"
        input:
            upstream(recipe),
            [flag("acceptance")] if recipe.stage == "finetune" else [],
        output:
            touch(flag(label)),
        params:
            label=label,
            file=PARAMS,
        threads: P.threads
        priority: recipe.training_steps + recipe.denoiser_calls // 1000
        shell:
            "{PYTHON} -m deme_lib make {params.label} -f {params.file:q}"


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
