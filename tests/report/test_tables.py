"""One table for experiments and sweeps, with the floor on top; numbers as printed."""

import pandas as pd
import pytest
from evidence import ALL, SWEEPS, write

from deme_lib.report import formats, records, tables


def test_every_number_is_of_the_records(known):
    rows = tables.table(known).set_index("arm")
    assert list(rows.index) == ["real", *ALL]
    means = known.metrics.groupby(["training_seed", "arm"])[["fid", "kid"]].mean()
    for arm in ALL:
        mine = means.xs(arm, level="arm")
        assert rows.loc[arm, "fid_mean"] == pytest.approx(mine["fid"].mean())
        assert rows.loc[arm, "fid_sd"] == pytest.approx(mine["fid"].std(ddof=1))
        assert rows.loc[arm, "kid_mean"] == pytest.approx(mine["kid"].mean())
        assert rows.loc[arm, "excess"] == pytest.approx(mine["fid"].mean() - known.floor("fid"))
        if arm != "pretrained":
            d = mine["fid"].mean() - rows.loc["pretrained", "fid_mean"]
            assert rows.loc[arm, "difference"] == pytest.approx(d)
    assert rows.loc["real", "fid_mean"] == known.floor("fid") and rows.loc["real", "excess"] == 0
    assert pd.isna(rows.loc["pretrained", "difference"])
    assert rows.loc["averaged", "calls_per_image"] == 80


def test_one_printed_table_serves_both_ablations(known):
    shown = tables.printed(known)
    assert list(shown) == [
        "arm", "FID ↓", "excess over the floor", "difference to pretrained", "IS ↑",
        "test loss ↓", "calls", "parameters",
    ]  # fmt: skip
    assert shown["arm"].iloc[0] == "real images, the floor"
    assert not shown["arm"].str.contains("EMA").any() and len(shown) == 15
    row = tables.table(known).set_index("arm").loc["soup"]
    printed = shown.set_index("arm").loc[known.titles["soup"]]
    assert printed["FID ↓"] == f"{row['fid_mean']:.3f}"
    half = (row["difference_high"] - row["difference_low"]) / 2
    assert printed["difference to pretrained"] == formats.plus_minus(row["difference"], half)


def test_without_a_floor_there_is_no_row_of_it(tmp_path):
    known = records.read(write(tmp_path / "records", optional=False))
    shown = tables.printed(known)
    assert shown["arm"].iloc[0] == "pretrained" and "excess over the floor" not in shown


def test_a_sweep_has_cells_weights_and_the_paper_s_number():
    known = records.read(SWEEPS / "techniques" / "records")
    shown = tables.printed(known)
    assert list(shown["ranges and techniques"][:3]) == ["the base", "N=1, none", "N=1, none"]
    assert list(shown[tables.PAPER][:4]) == ["–", "4.40", "4.40", "–"]
    assert shown["weights"].iloc[-1] == ", ".join(["0.125"] * 8)
    fid = known.metrics.groupby(["cell", "arm"])["fid"].mean()
    row = tables.table(known).set_index(["cell", "arm"]).loc[("N=8, PS", "deme_merged")]
    expected = fid["N=8, PS", "deme_merged"] - fid["base", "pretrained"]
    assert row["difference"] == pytest.approx(expected)
    assert tables.note(known).startswith("With N=1 the routed row is")
    assert tables.PAPER not in tables.printed(records.read(SWEEPS / "cuts" / "records"))


def test_numbers_as_printed():
    assert formats.number(-0.059712) == "−0.0597" and formats.number(1234.5) == "1,234"
    assert formats.number(0.0) == "0.000" and formats.number(float("nan")) == "–"
    assert formats.percent(-0.1623) == "−16.2 %" and formats.percent(1.2) == "120.0 %"
    assert formats.plus_minus(-0.1234, 0.0456) == "−0.123 ± 0.046"
    assert formats.plus_minus(3.5, 12.3) == "+4 ± 12"
    assert formats.interval(-0.0601, -0.0672, -0.0529) == "−0.0601 [−0.0672, −0.0529]"
    assert formats.interval(0.019, 0.0004, 0.0372) == "0.0190 [0.0004, 0.0372]"  # not 0.000
    assert formats.decimals(40000, 0) == "40,000"


def test_latex_needs_no_unicode(known):
    text = formats.latex(tables.printed(known), tables.caption(known), "table")
    assert not set("±×−–↓↑") & set(text) and r"95 \% t" in text
