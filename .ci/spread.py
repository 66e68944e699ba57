"""Measure how far the metrics move when only rounding differs; run by hand after results changed.

    .venv/bin/python .ci/spread.py rounding            # all arms
    .venv/bin/python .ci/spread.py threads merged ...  # some

Repeats the digits experiment with every initial weight moved by one rounding, or with two threads
instead of one, in a runs folder of its own, and writes its metrics to .ci/spread/.
"""

import json
import sys
from pathlib import Path

import yaml
from deme_lib.arms import ARMS, present
from deme_lib.parameters import DEFAULTS

from deme_lib import ROOT, parameters, recipes, records, stages

REPEATS = {"rounding": {"init_roundings": 1}, "threads": {"threads": 2}}
OUT = Path(__file__).parent / "spread"


def repeat(name: str, arms: list[str]) -> None:
    preset = ROOT / "runs" / f"spread-{name}.yaml"
    values = yaml.safe_load(DEFAULTS.read_text()) | REPEATS[name]
    preset.parent.mkdir(exist_ok=True)
    preset.write_text(yaml.safe_dump({**values, "runs_dir": f"runs/spread-{name}"}))
    p = parameters.load(preset)
    made = stages.make_all([recipes.metrics(p, ARMS[arm]) for arm in arms], p)
    out = OUT / name
    out.mkdir(parents=True, exist_ok=True)
    records.metrics(made, p.seed).to_csv(out / "metrics.csv", index=False)
    (out / "run.json").write_text(json.dumps({"parameters": p.model_dump()}, indent=1) + "\n")


if __name__ == "__main__":
    repeat(sys.argv[1], sys.argv[2:] or [arm.name for arm in present("none")])
