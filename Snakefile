"""An experiment's jobs side by side, then its notebooks, which find everything made.

    snakemake --cores 2 --config params=params/fashion8.yaml            # everything
    snakemake jobs --cores 2 --config params=params/fashion8.yaml       # without notebooks

Order, parallel jobs and clusters are Snakemake's (params/profiles). A job is a few artefacts that one
process makes; its outputs are their records in the store, so what exists is not made again.
"""

import sys
from pathlib import Path

from deme_lib.experiment import collect, graph, parameters

PARAMS = config.get("params", "params/fashion8.yaml")
FIGURES = config.get("figures", "runs/figures")
ASKED = config.get("seeds")  # Snakemake reads "0" as a number and "" as None
AGAIN = [] if ASKED is None else [int(seed) for seed in str(ASKED).split()]
P = parameters.load(PARAMS, figures_dir=FIGURES, again=AGAIN)
NAME = parameters.folder_name(P)
SEEDS = ", ".join(map(str, AGAIN))
OUT = f"{P.runs_dir}/{NAME}"
PYTHON = f'"{sys.executable}"'
NOTEBOOKS = [path.stem for path in sorted(Path("notebooks").glob("0*.ipynb"))]
JOBS = {}
for q in collect.missing(P):
    JOBS |= graph.jobs(q, looked_at=P.looks_at(q.seed), fine="fine" in config)
MAKER = {a.name: job for job, made in JOBS.items() for a in made}


def upstream(job):
    """Records that a job reads and others make."""
    needed = {a.name: a for made in JOBS[job] for a in made.upstream() if MAKER.get(a.name) != job}
    return [str(a.record) for a in needed.values()]


def each_attempt(need):
    """A job that was killed for want of it asks for twice as much, then for three times."""
    return lambda wildcards, attempt: need * attempt


RECORDS = [str(a.record) for made in JOBS.values() for a in made]
RESOURCES = {"mem_mb": each_attempt(8000), "runtime": each_attempt(240), "gpu": int(P.device == "cuda")}


rule all:
    input:
        expand(OUT + "/{notebook}.ipynb", notebook=NOTEBOOKS),


rule jobs:
    input:
        RECORDS,


for job, made in JOBS.items():

    rule:
        name:
            "make_" + "".join(c if c.isalnum() else "_" for c in job)
        input:
            upstream(job),
        output:
            [update(str(a.record)) for a in made],  # else Snakemake deletes what is there first
        params:
            names=[a.name for a in made],
        threads: P.threads
        priority: len(made)  # the longest chain first
        resources: **RESOURCES
        shell:
            "{PYTHON} -m deme_lib make {params.names:q} -f {PARAMS:q}"


rule notebook:
    input:
        RECORDS,
        notebook="notebooks/{notebook}.ipynb",
    output:
        OUT + "/{notebook}.ipynb",
    threads: P.threads
    resources: **RESOURCES
    retries: 1  # parallel kernels can race for ports
    shell:
        "{PYTHON} -m papermill --no-progress-bar --log-level ERROR {input.notebook:q} {output:q} "
        "-f {PARAMS:q} -p figures_dir {FIGURES:q} -p again '[{SEEDS}]'"
