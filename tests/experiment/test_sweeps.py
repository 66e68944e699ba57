"""Sweeps: checked before anything runs, sharing what is equal, recorded whole."""

import json

import pandas as pd
import pytest
import yaml

from deme_lib import ROOT
from deme_lib.experiment import collect, parameters, recipes, sweeps
from deme_lib.experiment.arms import ARMS
from deme_lib.experiment.parameters import ParameterError
from deme_lib.report import records, render, tables

SHIPPED = sorted((ROOT / "params" / "sweeps").glob("*.yaml"))
SET = {"loss_weighting": "uncertainty"}
TINY = {
    "sweep": "tiny",
    "axis": "N",
    "arms": ["deme_routed", "deme_merged", "reweighted"],
    "beside": ["pretrained"],
    "against": ["1"],
    "cells": [
        {"cell": "1", "set": SET | {"n_ranges": 1, "finetune_steps": 8}},
        {"cell": "2", "set": SET | {"n_ranges": 2, "range_cut": "log-snr"}},
    ],
}
LONGER = [{"cell": str(n), "set": SET | {"n_ranges": n, "finetune_steps": 16 // n}} for n in (1, 2)]
SIZES = {"pretrain_steps": 4, "finetune_steps": 4, "ema_decay": 0.0, "sampling_steps": 1}
SIZES |= {"samples": 30, "acceptance_samples": 60, "model_channels": [8], "seeds": [0, 1]}
SIZES |= {"further_ema_decays": []}


@pytest.fixture
def write(tmp_path, preset):
    """A function: a sweep file over a tiny preset of its own, ``write(axis="other")``."""
    base = preset(figures_dir=str(tmp_path / "figures"), **SIZES)

    def write(**changes):
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump({**TINY, "base": str(base), **changes}))
        return path

    return write


def cell(name="1", **changes):
    return {"cell": name, "set": SET | changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"cells": [cell(n_range=1), cell("b")]},
            r"cell '1'.*unknown .*'n_range'; did you mean",
        ),
        (
            {"against": ["a"], "cells": [cell("a", n_ranges=1), cell("b")]},
            r"different totals.*set finetune_steps",
        ),
        ({"cells": [cell(), cell("base")]}, r"other than base"),
        ({"arms": ["routd"]}, r"no arm 'routd'; there are pretrained"),
        ({"beside": ["all_plain"]}, r"pretrained in beside"),
        ({"arms": ["soup", "soup"]}, r"name every arm once"),
        ({"cells": [cell(n_ranges=1)]}, r"compares no cell with anything else"),
        (
            {"cells": [cell(samples=31), cell("2")]},
            r"cell '1' changes the pretrained model, its evaluation",
        ),
        (
            {"beside": ["pretrained", "all_plain"], "cells": LONGER},
            r"'base': 8, '1': 16.*pretrained alone",
        ),
        ({"against": ["3"]}, r"against names \['3'\]: no cell"),
        ({"colour": "red"}, r"is no sweep:\n  colour"),
        ({"base": "params/digit.yaml"}, r"no parameter file 'params/digit.yaml'"),
        ({"cells": [cell(seeds=[0, 3]), cell("2")]}, r"the seeds"),
        ({"beside": ["pretrained", "reweighted"]}, r"reweighted needs a loss_weighting"),
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
    assert sweep.sweep == path.stem == sweeps.folder_name(sweep)
    assert len(sweep.cells) >= 4
    seeds = len(parameters.load(sweep.base).seeds)
    metrics = [name for name in sweeps.plan(path) if name.startswith("metrics-")]
    judged = seeds * (len(sweep.cells) * len(sweep.arms) + len(sweep.beside))
    assert judged - 2 * seeds <= len(metrics) <= judged  # a cell may equal the base


def test_cells_share_what_is_equal_with_the_base_and_with_each_other():
    base = parameters.load("params/digits.yaml").per_seed()[0]
    plans = {path.stem: sweeps.plan(path) for path in SHIPPED}
    for plan in plans.values():
        assert recipes.baseline(base).name in plan
    default = recipes.metrics(base, ARMS["deme_merged"]).name
    assert default in plans["probability"] and default in plans["cuts"]
    in_both = plans["techniques"].keys() & plans["ranges"].keys()
    seeds = len(parameters.load("params/digits.yaml").seeds)
    assert sum(name.startswith("deme-") for name in in_both) == seeds * (1 + 8)


def test_a_plan_of_several_training_seeds_has_them_all():
    p = parameters.load("params/digits.yaml")
    plan, one = sweeps.plan("params/digits.yaml"), recipes.everything(p.per_seed()[0])
    assert one.keys() <= plan.keys()
    found = [(r.label, q.seed) for r, q in plan.values() if r.label in ("baseline", "acceptance")]
    assert found == [("baseline", 0), ("acceptance", 0)] + [("baseline", s) for s in p.seeds[1:]]


def test_records_of_a_sweep_are_an_experiment_s_with_one_more_column(write, tmp_path):
    path = write(sweep="cuts")
    sweep = sweeps.load(path)
    out = collect.collect_sweep(sweep)
    assert out.is_relative_to(tmp_path / "figures") and out.name == "cuts-changed"
    table = pd.concat(pd.read_csv(out / "records" / f"seed-{s}" / "metrics.csv") for s in (0, 1))
    assert table.groupby(["cell", "arm"]).size().to_dict() == {
        **{(cell, arm): 2 for cell in ("1", "2") for arm in TINY["arms"]},
        ("base", "pretrained"): 2,
    }
    document = json.loads((out / "sweep.json").read_text())
    assert [c["cell"] for c in document["cells"]] == ["1", "2"]
    assert not sweeps.plan(path, recorded=False)
    before = (out / "records" / "seed-0" / "metrics.csv").read_bytes()
    collect.collect_sweep(sweep)
    assert (out / "records" / "seed-0" / "metrics.csv").read_bytes() == before
    other = write(sweep="cuts", cells=[cell("1"), cell("2", probability=0.9)])
    with pytest.raises(ParameterError, match="recorded with other cells or arms: delete"):
        collect.collect_sweep(sweeps.load(other))
    assert json.loads((out / "sweep.json").read_text()) == document
    found = tables.table(records.read(out / "records"))
    assert {("1", "deme_merged"), ("2", "deme_merged")} <= set(
        zip(found["cell"], found["arm"], strict=True)
    )
    render.render(out.parents[1])
    assert (out.parent / "cuts-changed.md").is_file()
