"""CI's comparison fails when, and only when, a number moves further than was measured."""

import importlib.util
import json
import shutil
import sys

import pandas as pd
import pytest
import synthetic

from deme_lib import ROOT


@pytest.fixture(scope="module")
def compare():
    spec = importlib.util.spec_from_file_location("compare", ROOT / ".ci" / "compare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def runs(tmp_path):
    """A committed run, and a repeat in which FIDs lie 0.05 higher, and one arm 0.01 more."""
    committed = synthetic.write(tmp_path / "records")
    changed(committed, tmp_path / "spread" / "rounding", fid=0.05, routed=0.01)
    return committed, tmp_path / "spread"


def before_training_seeds(folder):
    """Rewrite a run as it was recorded when there was one training seed and no such column."""
    frame = pd.read_csv(folder / "metrics.csv")
    frame[frame["training_seed"] == 0].drop(columns="training_seed").to_csv(
        folder / "metrics.csv", index=False
    )
    run = json.loads((folder / "run.json").read_text())
    del run["parameters"]["seeds"]
    run["parameters"]["seed"] = 0
    (folder / "run.json").write_text(json.dumps(run))


def changed(committed, folder, fid=0.0, routed=0.0, seed=0, **parameters):
    """A copy of a run with every FID, one arm's, the seeds or parameters moved."""
    shutil.copytree(committed, folder)
    frame = pd.read_csv(folder / "metrics.csv")
    frame["fid"] += fid
    frame.loc[frame["arm"] == "routed", "fid"] += routed
    frame["seed"] += seed
    frame.to_csv(folder / "metrics.csv", index=False)
    run = json.loads((folder / "run.json").read_text())
    run["parameters"] |= parameters
    (folder / "run.json").write_text(json.dumps(run))
    return folder


@pytest.mark.parametrize(
    ("fid", "routed", "kinds"),
    [
        (0, 0, set()),
        (0.45, 0.09, set()),
        (0.65, 0, {"mean"}),
        (0, 0.11, {"minus pretrained", "minus merged"}),  # differences are held tighter
        (0, float("nan"), {"mean", "minus pretrained", "minus merged"}),
    ],
)
def test_what_moves_further_than_ten_times_the_spread(compare, runs, tmp_path, fid, routed, kinds):
    committed, spread = runs
    other = changed(committed, tmp_path / "other", fid, routed)
    far = compare.compare(committed, other, spread)
    assert {index[0] for index in far.index} == kinds
    assert all(index[2] == "fid" for index in far.index)


def test_a_repeat_may_hold_fewer_arms_but_a_run_may_not(compare, runs, tmp_path):
    committed, spread = runs
    fewer = changed(committed, spread / "threads", fid=0.07)
    frame = pd.read_csv(fewer / "metrics.csv")
    frame[frame["arm"].isin(["pretrained", "merged", "routed"])].to_csv(
        fewer / "metrics.csv", index=False
    )
    assert compare.tolerances(committed, spread).loc["mean", "fid"] == pytest.approx(0.7)
    with pytest.raises(ValueError, match="arms"):
        compare.compare(committed, fewer, spread)


@pytest.mark.parametrize("training_seeds", [(0,), (0, 1, 2)])
def test_a_repeat_from_before_a_parameter_joined_still_counts(compare, tmp_path, training_seeds):
    committed = synthetic.write(tmp_path / "records", training_seeds=training_seeds)
    repeat = changed(committed, tmp_path / "spread" / "rounding", fid=0.05)
    before_training_seeds(repeat)
    later = changed(committed, tmp_path / "later", joined_later="yes")
    assert compare.tolerances(later, tmp_path / "spread").loc["mean", "fid"] == pytest.approx(0.5)
    assert compare.compare(later, later, tmp_path / "spread").empty
    with pytest.raises(ValueError, match="joined_later"):  # of two runs, both must know it
        compare.compare(later, committed, tmp_path / "spread")


def test_a_repeat_with_another_value_is_refused(compare, runs):
    committed, spread = runs
    changed(committed, spread / "odd", loss_draws=9)
    with pytest.raises(ValueError, match="loss_draws"):
        compare.tolerances(committed, spread)


def test_a_run_must_hold_every_training_seed(compare, tmp_path):
    committed = synthetic.write(tmp_path / "records", training_seeds=(0, 1))
    fewer = changed(committed, tmp_path / "fewer")
    frame = pd.read_csv(fewer / "metrics.csv").query("training_seed == 0")
    frame.to_csv(fewer / "metrics.csv", index=False)
    changed(committed, tmp_path / "spread" / "rounding", fid=0.05)
    with pytest.raises(ValueError, match="seeds"):
        compare.compare(committed, fewer, tmp_path / "spread")


@pytest.mark.parametrize(
    ("change", "message"), [({"seed": 10}, "seeds"), ({"finetune_lr": 9.0}, "finetune_lr")]
)
def test_other_experiments_are_refused(compare, runs, tmp_path, change, message):
    committed, spread = runs
    with pytest.raises(ValueError, match=message):
        compare.compare(committed, changed(committed, tmp_path / "other", **change), spread)


def test_without_a_measured_spread_nothing_passes(compare, runs, tmp_path):
    committed, _ = runs
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError):
        compare.compare(committed, committed, tmp_path / "none")


def test_the_committed_run_passes_against_itself(compare, monkeypatch, capsys):
    records = str(ROOT / "figures" / "digits" / "records")
    monkeypatch.setattr(sys, "argv", ["compare.py", records, records])
    assert compare.main() == 0
    assert "tolerance" in capsys.readouterr().out
