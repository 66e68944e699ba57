"""Tables of sweeps: paired with the base's pretrained model, honest about what they are not."""

import json

import numpy as np
import pandas as pd
import pytest
import synthetic

from deme_lib.report import comparisons, sweep_tables
from deme_lib.report.sweep_tables import NOT_COMPARABLE


def reweighting(folder):
    cells = {"SNR+1": 5.41, "Trun-SNR": 4.49, "uncertainty": None}
    beside = ("pretrained", "all_plain", "all_same", "merged")
    synthetic.write_sweep(folder, "reweighting", ("reweighted",), beside, cells)
    return sweep_tables.read(folder, "reweighting")


def techniques(folder):
    return sweep_tables.read(synthetic.write_sweep(folder), "techniques")


def test_every_number_is_of_the_records(tmp_path):
    sweep = techniques(tmp_path)
    rows = sweep_tables.table(sweep).set_index(["cell", "arm"])
    wide = sweep.metrics.pivot(index="seed", columns=["cell", "arm"], values="fid")
    assert set(wide.columns) == set(rows.index) and len(rows) == 9
    for key, row in rows.iterrows():
        assert row["fid_mean"] == pytest.approx(wide[key].mean())
        assert row["fid_sd"] == pytest.approx(wide[key].std())
    expected = comparisons.paired_interval(
        wide["N=8, PS", "merged"] - wide["base", "pretrained"], 0.95
    )
    row = rows.loc[("N=8, PS", "merged")]
    assert (row["difference"], row["difference_halfwidth"]) == pytest.approx(expected)
    expected = comparisons.paired_interval(
        wide["N=8, PS", "merged"] - wide["N=8, PS", "routed"], 0.95
    )
    assert (row["merging"], row["merging_halfwidth"]) == pytest.approx(expected)
    assert rows.xs("routed", level="arm")["merging"].isna().all()
    expected = comparisons.paired_interval(
        wide["N=8, PS", "merged"] - wide["N=1, none", "merged"], 0.95
    )
    found = sweep_tables.differences(sweep).set_index(["cell", "arm"])
    row = found.loc[("N=8, PS", "merged")]
    assert (row["difference"], row["halfwidth"]) == pytest.approx(expected)
    assert (row["other_cell"], row["other_arm"]) == ("N=1, none", "merged")
    assert len(found) == 6 and "N=1, none" not in found.index
    assert list(rows["training_steps"]) == [0, *[8000] * 8]
    assert rows.loc[("N=1, none", "routed"), "paper"] == 4.4


def test_seeds_are_paired_whatever_the_order_of_rows(tmp_path):
    expected = sweep_tables.table(techniques(tmp_path))
    path = tmp_path / "sweeps" / "techniques.csv"
    pd.read_csv(path).sample(frac=1, random_state=0).to_csv(path, index=False)
    pd.testing.assert_frame_equal(
        sweep_tables.table(sweep_tables.read(tmp_path, "techniques")), expected
    )


def test_a_sweep_of_one_arm_has_the_base_s_arms_as_rows(tmp_path):
    sweep = reweighting(tmp_path)
    rows = sweep_tables.printed(sweep)
    assert list(rows["the axis of reweighting"]) == ["the base"] * 4 + list(
        ("SNR+1", "Trun-SNR", "uncertainty")
    )
    assert list(rows["training steps"]) == ["0", *["4,000"] * 3, *["8,000"] * 3]
    assert list(rows[NOT_COMPARABLE][4:]) == ["5.41", "4.49", "–"]
    assert "FID merged − routed" not in rows
    assert rows["FID − pretrained"][0] == "–" and "±" in rows["FID − pretrained"][1]
    assert "searched" not in sweep_tables.caption(sweep)


def test_without_numbers_of_the_paper_there_is_no_column(tmp_path):
    synthetic.write_sweep(tmp_path, "cuts", cells={"even": None, "random": None})
    assert NOT_COMPARABLE not in sweep_tables.printed(sweep_tables.read(tmp_path, "cuts"))


def test_the_caption_says_what_limits_the_numbers(tmp_path):
    text = sweep_tables.caption(techniques(tmp_path))
    for part in (
        "digits: n = 2,000 images per row and sampling seed, features digits-a, DDIM 20 steps",
        "5 sampling seeds (0, 1, 2, 3, 4), one training seed (0)",
        "95 % t intervals; all 18 are exploratory and uncorrected",
        "Every cell trains for 8,000 steps in total",
        "with 151 losses tried and 18,000 images made",
        "Of the base (params/digits.yaml): pretrained.",
    ):
        assert part in text


def test_cell_names_that_look_like_numbers_stay_as_they_are(tmp_path):
    synthetic.write_sweep(tmp_path, "p", cells={"0": None, "0.30": None})
    rows = sweep_tables.table(sweep_tables.read(tmp_path, "p"))
    assert list(rows["cell"].unique()) == ["base", "0", "0.30"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m.drop(columns="n"), r"lacks the columns \['n'\]"),
        (lambda m: m.assign(n=[100, *m["n"][1:]]), "mixes n"),
        (lambda m: m.assign(training_seed=[1, *m["training_seed"][1:]]), "mixes training_seed"),
        (lambda m: m[1:], "('base', 'pretrained') needs exactly one row per sampling seed"),
        (lambda m: m[:-1], "'merged') needs exactly one row"),
        (lambda m: pd.concat([m, m[-1:]]), "'merged') needs exactly one row"),
    ],
)
def test_records_that_cannot_be_compared_are_refused(tmp_path, change, message):
    path = synthetic.write_sweep(tmp_path) / "sweeps" / "techniques.csv"
    change(pd.read_csv(path)).to_csv(path, index=False)
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        sweep_tables.read(tmp_path, "techniques")


def test_rendering_writes_every_sweep_the_same_way_twice(tmp_path):
    techniques(tmp_path)
    reweighting(tmp_path)
    for out in ("one", "two"):
        sweep_tables.render(tmp_path, tmp_path / out)
    written = sorted((tmp_path / "one" / "sweeps").iterdir())
    names = ("reweighting", "techniques")
    kinds = ("-compared.csv", ".csv", ".md", ".png", ".tex")
    assert [p.name for p in written] == [f"{name}{kind}" for name in names for kind in kinds]
    for path in written:
        assert path.read_bytes() == (tmp_path / "two" / "sweeps" / path.name).read_bytes()
    text = (tmp_path / "one" / "sweeps" / "techniques.md").read_text()
    assert (
        text.startswith("| the axis of techniques | arm | FID ↓ |") and "Sweep: the sweep" in text
    )
    csv = pd.read_csv(tmp_path / "one" / "sweeps" / "techniques.csv")
    np.testing.assert_allclose(
        csv["fid_mean"], sweep_tables.table(techniques(tmp_path))["fid_mean"], rtol=1e-5
    )


def test_without_sweeps_nothing_is_written(tmp_path):
    sweep_tables.render(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_cells_of_unequal_training_are_said_to_be(tmp_path):
    path = synthetic.write_sweep(tmp_path) / "sweeps" / "techniques.json"
    document = json.loads(path.read_text())
    document["cells"][0]["training_steps"] = 500
    path.write_text(json.dumps(document))
    text = sweep_tables.caption(sweep_tables.read(tmp_path, "techniques"))
    assert "Cells train for 500 to 8,000 steps in total" in text
