"""Measure how far the metrics move when only rounding differs; run by hand after results changed.

    .venv/bin/python .ci/spread.py

Repeats the digits experiment with every initial weight moved by one rounding, and with two threads
instead of one, each in a runs folder of its own, and writes their metrics to .ci/spread/.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

from deme_lib import ROOT, parameters, recipes, records, stages
from deme_lib.arms import ARMS
from deme_lib.parameters import DEFAULTS

REPEATS = {"rounding": {"init_roundings": 1}, "threads": {"threads": 2}}
OUT = Path(__file__).parent / "spread"


def repeat(name: str, changed: dict) -> None:
    preset = ROOT / "runs" / f"spread-{name}.yaml"
    values = yaml.safe_load(DEFAULTS.read_text()) | changed | {"runs_dir": f"runs/spread-{name}"}
    preset.parent.mkdir(exist_ok=True)
    preset.write_text(yaml.safe_dump(values))
    snakemake = [sys.executable, "-m", "snakemake", "metrics"]
    options = ["--nolock", "--rerun-incomplete", "--rerun-triggers", "mtime"]
    settings = ["--cores", str(os.cpu_count()), "--config", f"params={preset}"]
    subprocess.run([*snakemake, *options, *settings], cwd=ROOT, check=True)
    p = parameters.load(preset)
    made = stages.make_all([recipes.metrics(p, arm) for arm in ARMS.values()], p)
    out = OUT / name
    out.mkdir(parents=True, exist_ok=True)
    records.metrics(made).to_csv(out / "metrics.csv", index=False)
    (out / "run.json").write_text(json.dumps({"parameters": p.model_dump()}, indent=1) + "\n")


if __name__ == "__main__":
    for name in sys.argv[1:] or REPEATS:
        repeat(name, REPEATS[name])
