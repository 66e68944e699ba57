"""An experiment of seconds from its parameters to its records; committed rows; the command line."""

import json
from dataclasses import replace

import pandas as pd
import pytest
from tiny import experiment

from deme_lib import ROOT
from deme_lib.__main__ import main
from deme_lib.experiment import collect, graph, parameters
from deme_lib.experiment.arms import ARMS, averaged
from deme_lib.experiment.parameters import ParameterError, folder_name
from deme_lib.report import render
from deme_lib.report.records import read

ARMS_TRIED = ["balanced", "last_expert", "deme_routed", "deme_merged", "averaged", "distilled"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Parameters and folder of an experiment of two trainings and two cells, collected."""
    cells = [{"cell": "default"}, {"cell": "p = 1", "probability": 1.0, "arms": ["deme_merged"]}]
    cells += [{"cell": "searched", "merge_weights": "search", "arms": ["deme_merged"]}]
    runs = tmp_path_factory.mktemp("made") / "runs"
    p = experiment(runs, seeds=[0, 1], sampling_seeds=[0, 1], arms=ARMS_TRIED, cells=cells)
    return p, collect.collect(p)


def test_every_row_is_recorded_for_every_training_and_sampling_seed(made):
    p, folder = made
    found = read(folder / "records")
    rows = [(cell, arm) for cell, arm in p.rows()]
    assert len(rows) == 1 + 6 + 2
    metrics = found.metrics
    assert len(metrics) == len(rows) * 2 * 2
    assert set(metrics.groupby(["cell", "arm"], sort=False).groups) == set(rows)
    assert (metrics["n"] == p.samples).all() and (metrics["features"] == "digits-a").all()
    arms = found.arms.query("training_seed == 0 and cell == 'default'").set_index("arm")
    cost = arms[["parameters", "calls_per_image", "training_steps"]].T.to_dict("list")
    one, merged = cost["pretrained"][0], cost["deme_merged"][0]
    assert cost.pop("pretrained") == [one, 2, 0] and cost.pop("balanced") == [one, 2, 16]
    assert cost.pop("last_expert") == [2 * one, 2, 8]
    assert cost.pop("deme_routed") == [2 * merged, 2, 16]
    assert cost.pop("deme_merged") == [merged, 2, 16]
    assert cost.pop("averaged") == [2 * merged, 4, 16]
    assert cost == {"distilled": [one, 2, 32]}


def test_a_search_s_weights_are_those_of_its_best_trial(made):
    records = made[1] / "records"
    search = pd.read_csv(records / "search.csv").query("training_seed == 0")
    arms = pd.read_csv(records / "arms.csv").query("training_seed == 0 and cell == 'searched'")
    best = search.loc[search["fid"].idxmin()]
    assert best["chosen"] == 1 and search["chosen"].sum() == 1 and len(search) == 3
    assert json.loads(best["weights"]) == json.loads(arms["weights"].item())


def test_with_cells_a_table_is_drawn_and_no_model_is_looked_at(made):
    folder = made[1]
    assert not (folder / "records" / "gradients.csv").exists()
    render.render(folder)
    assert (folder / "table.md").is_file() and (folder / "cells.png").is_file()


def test_looks_are_of_the_lowest_training_seed_also_without_an_arm_of_experts(tmp_path):
    folder = collect.collect(experiment(tmp_path / "runs", seeds=[1, 0], arms=["all_plain"]))
    for kind in ("gradients", "landscape", "plane", "task_vectors", "activations", "history"):
        assert pd.read_csv(folder / "records" / f"{kind}.csv")["training_seed"].unique() == [0]


def test_collecting_again_changes_nothing(made):
    p, folder = made
    before = {path: path.read_bytes() for path in (folder / "records").iterdir()}
    assert collect.missing(p) == []
    collect.collect(p.model_copy(update={"again": [1]}))
    assert {path: path.read_bytes() for path in (folder / "records").iterdir()} == before


def test_records_of_other_parameters_are_refused(made):
    p, folder = made
    run = json.loads((folder / "records" / "run.json").read_text())
    run["parameters"]["samples"] = 9
    (folder / "records" / "run.json").write_text(json.dumps(run))
    with pytest.raises(ParameterError, match=r"recorded with other samples: delete"):
        collect.collect(p)
    run["parameters"]["samples"] = p.samples
    (folder / "records" / "run.json").write_text(json.dumps(run))


def test_committed_trainings_are_taken_over_and_not_made_again(tmp_path):
    places = {"runs_dir": str(tmp_path), "figures_dir": str(tmp_path / "figures")}
    p = parameters.load("params/fashion8.yaml", **places)
    folder = collect.collect(p)
    committed = ROOT / "figures" / "fashion8" / "records"
    assert {f.name for f in (folder / "records").iterdir()} == {f.name for f in committed.iterdir()}
    for path in committed.glob("*.csv"):
        assert (folder / "records" / path.name).read_bytes() == path.read_bytes()
    assert not (tmp_path / "store" / graph.data(p.per_seed()[0]).name).exists()
    assert [q.seed for q in collect.missing(p.model_copy(update={"again": [3]}))] == [3]
    more = parameters.load("params/fashion8.yaml", seeds=[0, 99], **places)
    assert [q.seed for q in collect.missing(more)] == [99]


def test_another_reading_of_committed_records_makes_nothing(tmp_path):
    places = {"runs_dir": str(tmp_path), "figures_dir": str(tmp_path / "figures")}
    p = parameters.load("params/fashion8.yaml", margin=0.1, base="soup", **places)
    found = read(collect.collect(p) / "records")
    assert found.parameters["margin"] == 0.1 and found.base == "soup"
    assert folder_name(p) == f"fashion8-{p.digest()}" and not list(tmp_path.glob("store/*-*"))
    other = parameters.load("params/fashion8.yaml", samples=6000, **places)
    assert len(collect.missing(other)) == len(p.seeds)


def test_make_by_name_label_and_job(tmp_path, preset, capsys):
    file = str(preset(**{**experiment(tmp_path).model_dump(include={"total_steps"}), "seeds": [0]}))
    p = parameters.load(file).per_seed()[0]
    assert main(["make", "data", "-f", file]) == 0
    assert str(graph.data(p).folder) in capsys.readouterr().out
    assert main(["make", graph.reference(p).name, "-f", file]) == 0
    assert not graph.floor(p).folder.exists()
    assert main(["make", "prepare", "-f", file]) == 0
    assert graph.floor(p).folder.exists()
    first = graph.experts(p)[0]  # the job of all experts has its name
    assert main(["make", first.name, "-f", file]) == 0
    assert [folder.name for folder in first.folder.parent.glob("deme-*")] == [first.name]
    assert main(["make", "expert-9of2", "-f", file]) == 1
    said = capsys.readouterr().err
    assert "no job or artefact 'expert-9of2'" in said and "deme-1of4" in said


def test_rows_of_what_has_changed_since_are_made_again(tmp_path, monkeypatch):
    p = experiment(tmp_path / "runs", arms=["all_plain"])
    collect.collect(p)
    assert collect.missing(p) == []
    monkeypatch.setitem(ARMS, "all_plain", replace(ARMS["all_plain"], combine=averaged))
    assert [q.seed for q in collect.missing(p)] == [0]


def test_a_damaged_run_json_is_named(tmp_path):
    p = experiment(tmp_path / "runs", arms=["all_plain"])
    records = collect.folder_of(p) / "records"
    records.mkdir(parents=True)
    (records / "run.json").write_text('{"trainings": {"0"')
    with pytest.raises(ParameterError, match=r"run.json is damaged .*delete"):
        collect.missing(p)


def test_every_arm_is_judged_by_the_same_noise():
    p = parameters.load("params/fashion8.yaml").per_seed()[0]
    given = [graph.images(p, arm).arguments for arm in ARMS.values() if arm.name != "reweighted"]
    streams = [(a["seed"], a["sampling_seeds"], a["samples"], a["sampling_steps"]) for a in given]
    assert len(given) == len(ARMS) - 1 and all(stream == streams[0] for stream in streams)
