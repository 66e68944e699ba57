"""Every number of the tables again with plain pandas, for one cell and for several."""

import shutil

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from deme_lib import ROOT
from deme_lib.__main__ import main
from deme_lib.errors import Explained
from deme_lib.report import formats, intervals, records, render, tables

COMMITTED = ROOT / "figures" / "fashion8"


def plain(name):
    return pd.read_csv(COMMITTED / "records" / f"{name}.csv")


def test_every_number_is_of_the_records(known):
    rows, metrics, floor = tables.table(known), plain("metrics"), plain("floor")
    assert list(rows.index) == ["real", *known.titles] and rows["paper"].isna().all()
    assert rows.loc["real", "fid"] == pytest.approx(floor["fid"].mean())
    assert rows.loc["real", "kid"] == pytest.approx(floor["kid"].mean())
    losses, costs = plain("losses"), plain("arms").set_index(["training_seed", "arm"])
    fid = metrics.pivot(index="training_seed", columns="arm", values="fid")
    for arm in known.titles:
        mine, row = metrics[metrics["arm"] == arm], rows.loc[arm]
        for measure in ("fid", "fid_second", "pixel", "kid", "inception_score", "recall"):
            assert row[measure] == pytest.approx(mine[measure].mean())
        assert row["fid_sd"] == pytest.approx(mine["fid"].std(ddof=1))
        assert row["test_loss"] == pytest.approx(losses.loc[losses["arm"] == arm, "loss"].mean())
        assert row["parameters"] == costs.loc[(0, arm), "parameters"]
        assert row["calls_per_image"] == (80 if arm == "averaged" else 20)
        assert row["training_steps"] == {"pretrained": 0, "last_expert": 1000}.get(arm, 4000)
        test = scipy.stats.ttest_1samp(fid[arm] - fid["pretrained"], 0)
        expected = (fid[arm].mean() - fid["pretrained"].mean(), *test.confidence_interval(0.95))
        if arm != "pretrained":
            assert tuple(row[["difference", "low", "high"]]) == pytest.approx(expected)
    assert rows.loc["pretrained", ["difference", "low"]].isna().all()


def test_several_cells_are_one_table(cells):
    found = records.read(cells)
    rows, shown = tables.table(found), tables.printed(found)
    assert list(rows.index) == ["real", "pretrained", "all_plain", "N = 2 / deme_merged"]
    fid = plain("metrics").groupby("arm")["fid"].mean()
    expected = fid["deme_merged"] + 1 - fid["all_plain"]  # the base is no longer pretrained
    assert rows.loc["N = 2 / deme_merged", "difference"] == pytest.approx(expected)
    assert list(shown[tables.PAPER]) == ["–", "–", "–", "3.51"]
    assert "difference to one model, all timesteps" in shown
    compared = intervals.comparisons(found).query("measure == 'fid'")  # pairs with rows alone
    assert list(compared["a"] + " - " + compared["b"]) == found.parameters["exploratory"]


def test_one_training_seed(folder, change):
    change(folder, "run.json", lambda run: run.update(trainings={"3": {}}))
    found = records.read(folder)
    d = tables.table(found).loc["soup", "difference"]
    assert tables.printed(found).loc["soup", "difference to pretrained"] == f"{d:+.3f}"
    assert "training seed 3, sampling seed 0" in tables.caption(found)


def test_rendering_gives_the_committed_tables_and_the_same_bytes_twice(folder):
    written = []
    for _ in range(2):
        render.render(folder.parent)
        files = [path for path in folder.parent.iterdir() if path.is_file()]
        written.append({path.name: path.read_bytes() for path in files})
    assert written[0] == written[1]
    committed = {path.name: path for path in COMMITTED.iterdir() if path.is_file()}
    assert written[0].keys() == committed.keys()
    for name, path in committed.items():
        assert path.suffix == ".png" or path.read_bytes() == written[0][name], name


def test_the_ladder_has_every_size_with_its_gains(tmp_path, change):
    for name, times in (("larger", 4), ("small", 1)):
        own = shutil.copytree(COMMITTED / "records", tmp_path / name / "records")
        change(own, "arms.csv", lambda f, times=times: f.assign(parameters=times * f["parameters"]))
        change(own, "run.json", lambda run, name=name: run.update(experiment=name))
    folders = [str(tmp_path / name) for name in ("larger", "small")]
    assert main(["ladder", *folders, "-o", str(tmp_path / "new")]) == 0
    assert (tmp_path / "new" / "ladder.png").is_file()
    found = pd.read_csv(tmp_path / "new" / "ladder.csv")
    assert list(found["experiment"].unique()) == ["small", "larger"]
    assert list(found["parameters"].unique()) == [40489, 4 * 40489]
    for measure, sign in (("fid", -1), ("inception_score", 1)):
        x = plain("metrics").pivot(index="training_seed", columns="arm", values=measure)
        lacks = sign * (plain("floor")[measure].mean() - x["pretrained"].mean())
        d = sign * (x["deme_merged"] - x["averaged"]) / lacks
        expected = [d.mean(), *scipy.stats.ttest_1samp(d, 0).confidence_interval(0.95)]
        mine = found.query("a == 'deme_merged' and measure == @measure and experiment == 'larger'")
        assert mine[["effect", "low", "high"]].values[0] == pytest.approx(expected, rel=1e-4)
    change(own, "metrics.csv arms.csv losses.csv", lambda f: f[f["arm"] != "soup"])
    with pytest.raises(Explained, match="small lacks soup"):
        render.ladder([tmp_path / "small"], tmp_path)


def test_the_readme_is_filled_between_its_markers(folder, known):
    path = folder.parent / "README.md"
    path.write_text("before\n<!-- table -->\nold\n<!-- /table -->\nafter\n")
    for _ in range(2):
        render.fill_readme(path, folder.parent)
    assert path.read_text() == (
        f"before\n<!-- table -->\n{tables.readme(known)}\n<!-- /table -->\nafter\n"
    )
    path.write_text("no markers")
    with pytest.raises(Explained, match=r"README\.md needs each of <!-- table -->"):
        render.fill_readme(path, folder.parent)


def test_numbers_as_printed():
    assert formats.decimals(-0.0596) == "−0.060" and formats.decimals(40000, 0) == "40,000"
    assert formats.decimals(np.nan) == "–" and formats.plus_minus(np.nan, 1.0) == "–"
    assert formats.plus_minus(-0.1234, 0.0456) == "−0.123 ± 0.046"
    assert formats.plus_minus(3.5, 12.3) == "+4 ± 12"
    table = pd.DataFrame({"a": ["x"], "b": ["1"]})
    assert formats.markdown(table) == "| a | b |\n| :-- | --: |\n| x | 1 |"
