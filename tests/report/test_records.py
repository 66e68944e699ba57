"""The reader is strict: what is missing, incomplete or unknown is an error that says so."""

import numpy as np
import pandas as pd
import pytest

from deme_lib.report import records
from deme_lib.report.records import RecordsError


def test_committed_records_are_read_whole(known):
    assert known.training_seeds == list(range(8))
    assert list(known.titles) == known.parameters["arms"] and known.base == "pretrained"
    assert known.titles["deme_merged"] == "DeMe merged"
    fid = known.of("fid")
    assert fid.shape == (8, 7) and not fid.isna().any(axis=None)
    for name, columns in records.COLUMNS.items():
        if name != "search":
            assert len(known.frames[name]) and set(columns.split()) <= set(known.frames[name])
    assert known.search.empty and known.samples["real"].dtype == np.uint8
    assert known.floor_of("fid") == pytest.approx(known.floor["fid"].mean())
    assert np.isnan(known.floor_of("precision"))
    assert not hasattr(known, "gate")


def test_rows_of_a_cell_are_named_after_it(cells):
    known = records.read(cells)
    assert list(known.titles) == ["pretrained", "all_plain", "N = 2 / deme_merged"]
    assert known.titles["N = 2 / deme_merged"] == "N = 2 / DeMe merged"


def test_the_mean_over_sampling_seeds_hides_no_missing_number(folder, change):
    change(folder, "metrics.csv", lambda f: pd.concat([f, f.assign(seed=1, fid=f["fid"] + 2)]))
    known = records.read(folder)
    before = known.metrics.query("seed == 0 and training_seed == 3 and arm == 'soup'")["fid"].item()
    assert known.of("fid").loc[3, "soup"] == pytest.approx(before + 1)
    change(folder, "metrics.csv", lambda f: f.assign(fid=f["fid"].where(f.index > 0)))
    assert np.isnan(records.read(folder).of("fid").loc[0, "pretrained"])


@pytest.mark.parametrize("name", ["metrics.csv", "arms.csv", "losses.csv", "run.json"])
def test_a_missing_record_is_named_with_its_remedy(folder, name):
    (folder / name).unlink()
    with pytest.raises(RecordsError, match=f"{name} is missing: notebooks/05_evaluation.ipynb"):
        records.read(folder)


def test_looks_at_weights_are_optional(folder):
    for name in ("gradients", "landscape", "floor", "history"):
        (folder / f"{name}.csv").unlink()
    known = records.read(folder)
    assert known.gradients.empty and np.isnan(known.floor_of("fid"))


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        ("plane.csv", lambda f: f.drop(columns="w2"), r"plane\.csv .*'w2'"),
        ("metrics.csv", lambda f: f.rename(columns={"fid": "FID"}), r"metrics\.csv .*'FID', 'fid'"),
        ("metrics.csv", lambda f: f.assign(colour=1), r"metrics\.csv .*'colour'"),
        ("metrics.csv", lambda f: f[1:], r"metrics\.csv: missing .*\(0, 'pretrained', 0\)"),
        ("losses.csv", lambda f: f[:-1], r"losses\.csv: missing .*\(7, 'averaged', 950\)"),
        (
            "metrics.csv",
            lambda f: f.loc[[*f.index, 3]],
            r"metrics\.csv: .*\(0, 'plain_routed', 0\)",
        ),
        ("arms.csv", lambda f: f[f["training_seed"] != 5], r"arms\.csv: missing .*\(5, "),
    ],
)
def test_incomplete_records_are_refused(folder, change, name, how, message):
    change(folder, name, how)
    with pytest.raises(RecordsError, match=message):
        records.read(folder)


def test_rows_count_once_run_json_names_their_training_seed(folder, change):
    change(folder, "run.json", lambda run: run["trainings"].pop("7"))
    known = records.read(folder)
    assert known.training_seeds == list(range(7)) and set(known.losses["training_seed"]) == {
        *range(7)
    }
    change(folder, "run.json", lambda run: run["trainings"].update({"9": {}}))
    with pytest.raises(RecordsError, match=r"metrics\.csv: missing .*9, 'all_plain', 0"):
        records.read(folder)


def test_the_base_must_be_a_row(folder, change):
    change(folder, "run.json", lambda run: run["parameters"].update(base="nothing"))
    with pytest.raises(RecordsError, match="needs the rows pretrained and 'nothing'; it has pretr"):
        records.read(folder)
