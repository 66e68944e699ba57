"""The reader is strict: what is missing, incomplete or unknown is an error that says so."""

import numpy as np
import pandas as pd
import pytest

from deme_lib.experiment.parameters import FIELDS
from deme_lib.report import records
from deme_lib.report.records import RecordsError


def test_committed_records_are_read_whole(known):
    assert known.training_seeds == FIELDS["seeds"].default
    assert list(known.titles) == known.parameters["arms"]
    assert known.titles["deme_merged"] == "DeMe merged"
    shape = (len(known.training_seeds), len(known.parameters["arms"]))
    assert known.of("fid").shape == shape and not known.of("fid").isna().any(axis=None)
    assert known.looks.keys() == records.COLUMNS.keys() - set(records.NEEDED)
    assert known.samples["real"].dtype == np.uint8
    assert known.floor_of("fid") == pytest.approx(known.floor["fid"].mean())
    assert np.isnan(known.floor_of("precision"))


def test_rows_of_a_cell_are_named_after_it(cells):
    titles = records.read(cells).titles
    assert list(titles) == ["pretrained", "all_plain", "N = 2 / deme_merged"]
    assert titles["N = 2 / deme_merged"] == "N = 2 / DeMe merged"


def test_measures_are_means_over_sampling_seeds(known, folder, change):
    change(folder, "metrics.csv", lambda f: pd.concat([f, f.assign(seed=1, fid=f["fid"] + 2)]))
    assert np.allclose(records.read(folder).of("fid"), known.of("fid") + 1)


@pytest.mark.parametrize("name", ["metrics.csv", "floor.csv", "run.json"])
def test_a_missing_record_is_named_with_its_remedy(folder, name):
    (folder / name).unlink()
    with pytest.raises(RecordsError, match=f"{name} is missing: notebooks/05_evaluation.ipynb"):
        records.read(folder)
    (folder / name).write_text("{")
    with pytest.raises(RecordsError, match=name):
        records.read(folder)


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        ("plane.csv", lambda f: f.drop(columns="w2"), r"plane\.csv .*'w2'"),
        ("metrics.csv", lambda f: f.rename(columns={"fid": "FID"}), r"metrics\.csv .*'FID', 'fid'"),
        ("losses.csv", lambda f: f[:-1], r"losses\.csv: missing .*'averaged', 950\)"),
        ("metrics.csv", lambda f: f.loc[[*f.index, 3]], r"metrics\.csv: .*'soup', 0\)"),
        ("arms.csv", lambda f: f[f["training_seed"] != 1], r"arms\.csv: missing .*\(1, "),
    ],
)
def test_incomplete_records_are_refused(folder, change, name, how, message):
    change(folder, name, how)
    with pytest.raises(RecordsError, match=message):
        records.read(folder)


def test_rows_count_once_run_json_names_their_training_seed(folder, change):
    change(folder, "run.json", lambda run: run["trainings"].pop("0"))
    known = records.read(folder)
    assert 0 not in known.training_seeds and 0 not in set(known.losses["training_seed"])
    change(folder, "run.json", lambda run: run["trainings"].update({"99": {}}))
    with pytest.raises(RecordsError, match=r"metrics\.csv: missing .*99, 'all_plain', 0"):
        records.read(folder)
    change(folder, "run.json", lambda run: run["trainings"].clear())
    with pytest.raises(RecordsError, match=r"run\.json names no training: collect"):
        records.read(folder)
