"""Sweeps: checked before anything runs, sharing what is equal, recorded whole."""

import json

import pandas as pd
import pytest
import yaml

from deme_lib import ROOT
from deme_lib.experiment import parameters, recipes, sweep_records, sweeps
from deme_lib.experiment.arms import ARMS
from deme_lib.experiment.parameters import ParameterError
from deme_lib.report import sweep_tables

SHIPPED = sorted((ROOT / "params" / "sweeps").glob("*.yaml"))
TINY = {
    "sweep": "tiny",
    "title": "ranges of a tiny model",
    "axis": "N",
    "arms": ["routed", "merged", "reweighted"],
    "set": {"loss_weighting": "uncertainty"},
    "beside": ["pretrained"],
    "against": ["1"],
    "cells": [
        {"cell": "1", "set": {"n_ranges": 1, "finetune_steps": 8}},
        {"cell": "2", "set": {"n_ranges": 2, "finetune_steps": 4, "range_cut": "log-snr"}},
    ],
}
SET = TINY["set"]
LONGER = [{"cell": str(n), "set": {"n_ranges": n, "finetune_steps": 16 // n}} for n in (1, 2)]
SIZES = {"pretrain_steps": 4, "finetune_steps": 4, "ema_decay": 0.0, "sampling_steps": 1}
SIZES |= {"samples": 30, "acceptance_samples": 60, "model_channels": [8]}


@pytest.fixture
def write(tmp_path):
    """A function: a sweep file over a tiny preset of its own, ``write(axis="other")``."""
    smoke = yaml.safe_load((ROOT / "params" / "smoke.yaml").read_text())
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump({**smoke, **SIZES, "runs_dir": str(tmp_path / "runs")}))

    def write(**changes):
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump({**TINY, "base": str(base), **changes}))
        return path

    return write


def cell(name="1", **changes):
    return {"cell": name, "set": changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"cells": [cell(n_range=1), cell("b")]},
            r"cell '1'.*unknown .*'n_range'; did you mean",
        ),
        ({"cells": [cell(n_ranges="four"), cell("b")]}, r"cell '1'.*n_ranges='four'"),
        (
            {"against": ["a"], "cells": [cell("a", n_ranges=1), cell("b")]},
            r"different totals.*set finetune_steps",
        ),
        ({"cells": [cell(), cell()]}, r"names of their own"),
        ({"cells": [cell(), cell("base")]}, r"other than base"),
        ({"cells": []}, r"is no sweep:\n  cells"),
        ({"arms": ["routd"]}, r"no arm \['routd'\]; there are pretrained"),
        ({"set": {}}, r"needs loss_weighting in 1"),
        ({"beside": ["pretrained", "reweighted"]}, r"needs loss_weighting in base"),
        ({"beside": ["all_plain"]}, r"pretrained in beside"),
        ({"arms": ["merged", "merged"]}, r"name every arm once"),
        ({"cells": [cell("merged")]}, r"other than base or an arm's"),
        ({"cells": [cell("a / b")]}, r"without ' / '"),
        ({"cells": [cell(n_ranges=1)]}, r"compares no cell with anything else"),
        ({"set": SET | {"samples": 31}}, r"cell '1' changes the pretrained model, its evaluation"),
        ({"set": SET | {"pretrain_steps": 5}}, r"set the rest in its base"),
        ({"set": SET | {"runs_dir": "elsewhere"}}, r"or runs_dir"),
        (
            {"beside": ["pretrained", "all_plain"], "cells": LONGER},
            r"for \{16\} steps and the arms",
        ),
        ({"against": ["3"]}, r"against names \['3'\]: no cell"),
        ({"colour": "red"}, r"is no sweep:\n  colour"),
        ({"sweep": "../elsewhere"}, r"is no sweep:\n  sweep"),
        ({"base": "params/digit.yaml"}, r"no parameter file params/digit.yaml"),
        ({"set": SET | {"seeds": [0, 1]}}, r"one training seed"),
    ],
)
def test_a_wrong_sweep_is_refused_before_anything_runs(write, tmp_path, changes, message):
    path = write(**changes)
    with pytest.raises(ParameterError, match=f"(?s){message}"):
        sweeps.plan(path)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_the_shipped_sweeps_are_whole(path):
    sweep = sweeps.load(path)
    assert sweep.sweep == path.stem
    assert len(sweep.experiments()) == len(sweep.cells) >= 4
    metrics = [name for name in sweeps.plan(path) if name.startswith("metrics-")]
    judged = len(sweep.cells) * len(sweep.arms) + len(sweep.beside)
    assert judged - 2 <= len(metrics) <= judged  # a cell may equal the base


def test_cells_share_what_is_equal_with_the_base_and_with_each_other():
    base = parameters.load("params/digits.yaml")
    plans = {path.stem: sweeps.plan(path) for path in SHIPPED}
    for plan in plans.values():
        assert recipes.baseline(base).name in plan
    default = recipes.metrics(base, ARMS["merged"]).name
    assert default in plans["probability"] and default in plans["cuts"]
    in_both = plans["techniques"].keys() & plans["ranges"].keys()
    assert sum(name.startswith("expert-") for name in in_both) == 1 + 8


def test_a_plan_of_several_training_seeds_has_them_all(tmp_path):
    path = tmp_path / "seeds.yaml"
    path.write_text("seeds: [0, 1]\n")
    plan = sweeps.plan(path)
    single = recipes.everything(parameters.load("params/digits.yaml"))
    assert {r.name for r in single.values()} <= plan.keys()
    assert len(plan) == 2 * len(single) - len({"data", "reference"})
    assert [p.seeds for r, p in plan.values() if r.label == "baseline"] == [[0], [1]]


def test_records_of_a_sweep(write, tmp_path):
    sweep = sweeps.load(write())
    folder = sweep_records.collect(sweep)
    assert folder.is_relative_to(tmp_path / "runs")
    table = pd.read_csv(folder / "records" / "sweeps" / "tiny.csv")
    assert table.groupby(["cell", "arm"]).size().to_dict() == {
        **{(cell, arm): 2 for cell in ("1", "2") for arm in TINY["arms"]},
        ("base", "pretrained"): 2,
    }
    document = json.loads((folder / "records" / "sweeps" / "tiny.json").read_text())
    assert [c["cell"] for c in document["cells"]] == ["1", "2"]
    assert [c["training_steps"] for c in document["cells"]] == [8, 8]
    assert list(document["arms"]) == TINY["arms"]
    first, second = document["cells"]
    assert first["ranges"] == [[0, 1000]] and len(second["ranges"]) == 2
    assert sum(second["sampling_steps"]) == SIZES["sampling_steps"]
    assert second["results"]["merged"]["search_losses"] > 0
    assert len(second["results"]["merged"]["weights"]) == 2
    (weights,) = second["results"]["reweighted"]["task_weights"]
    assert len(weights) == 2
    sweep_tables.render(folder / "records", folder, "tiny")
    start, stop = second["ranges"][1]
    assert f"{start} to {stop - 1}" in (folder / "sweeps" / "tiny.md").read_text()
    before = (folder / "records" / "sweeps" / "tiny.csv").read_bytes()
    sweep_records.collect(sweep)
    assert (folder / "records" / "sweeps" / "tiny.csv").read_bytes() == before
