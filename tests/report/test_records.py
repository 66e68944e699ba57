"""One reader for an experiment and a sweep, which refuses what cannot be compared."""

import json

import pandas as pd
import pytest
from evidence import SWEEPS, change, write

from deme_lib.experiment.arms import DEFAULT_ARMS
from deme_lib.report import records


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "records", training_seeds=(0, 1, 10))


def test_training_seeds_are_read_as_one(folder):
    known = records.read(folder)
    assert known.training_seeds == known.parameters["seeds"] == [0, 1, 10]
    assert known.unit == "training_seed" and known.name == "fashion8-full"
    assert len(known.metrics) == 3 * 2 * len(DEFAULT_ARMS)
    assert known.rows == [("base", arm) for arm in DEFAULT_ARMS]
    assert known.arms_of(2) == ["pretrained", "deme_routed", "deme_merged", "averaged"]
    assert set(known.history["training_seed"]) == {0}
    assert known.floor("fid") == pytest.approx(known.frames["floor"]["fid"].mean())
    assert pd.isna(known.floor("fid_train"))


def test_only_metrics_arms_and_the_run_are_needed(tmp_path):
    known = records.read(write(tmp_path / "records", optional=False))
    assert known.gate.empty and known.samples == {}
    assert pd.isna(known.floor("fid"))


def test_a_sweep_is_the_same_with_cells():
    known = records.read(SWEEPS / "probability" / "records")
    assert known.name == "probability" and known.unit == "seed"
    assert list(known.metrics["cell"].unique()) == ["base", "0", "0.15", "0.3", "0.5", "0.75", "1"]
    assert records.label(*known.rows[0]) == "pretrained"
    assert records.label(*known.rows[-1]) == "1 / deme_merged"


@pytest.mark.parametrize("name", ["metrics.csv", "arms.csv", "run.json", ""])
def test_a_missing_record_is_named_with_its_remedy(folder, name):
    if name:
        (folder / "seed-1" / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name}.*make reproduce"):
        records.read(folder if name else folder.parent / "nowhere")


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        ("plane", lambda f: f.drop(columns="w2"), r"plane\.csv lacks the columns \['w2'\]"),
        ("metrics", lambda f: f[1:], "pretrained needs exactly one row"),
        ("metrics", lambda f: pd.concat([f, f[-1:]]), "averaged needs exactly one row"),
        ("metrics", lambda f: f.assign(training_seed=7), "holds training seeds .7."),
    ],
)
def test_what_cannot_be_compared_is_refused(folder, name, how, message):
    change(folder / "seed-0" / f"{name}.csv", how)
    with pytest.raises(ValueError, match=message):
        records.read(folder)


@pytest.mark.parametrize(("name", "refused"), [("margin", True), ("threads", False)])
def test_seeds_have_equal_parameters_but_for_how_they_were_computed(folder, name, refused):
    path = folder / "seed-1" / "run.json"
    run = json.loads(path.read_text())
    run["parameters"][name] = 9
    path.write_text(json.dumps(run))
    if not refused:
        assert records.read(folder)
        return
    with pytest.raises(ValueError, match="unequal margin"):
        records.read(folder)
