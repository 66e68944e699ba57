"""Numbers and tables between markers are those of the files, whatever stood there before."""

import pandas as pd
import pytest

from deme_lib.report import readme


@pytest.fixture
def figures(tmp_path):
    folder = tmp_path / "fashion8"
    folder.mkdir()
    rows = [("deme_merged", "soup", "fid"), ("deme_merged", "soup", "kid")]
    pd.DataFrame(rows, columns=["a", "b", "measure"]).assign(
        effect=-0.059712, low=-0.0672, high=-0.0529, relative=-0.16, share=[-0.1742, 0.2],
        share_low=-0.2, share_high=-0.15, n_units=8, verdict="different",
    ).to_csv(folder / "comparisons.csv", index=False)  # fmt: skip
    table = pd.DataFrame({"arm": ["real", "soup"], "fid_mean": [0.038, 0.34812]})
    table.assign(parameters=40000.0).to_csv(folder / "table.csv", index=False)
    gate = {"model": ["plain_routed"], "range": [4], "relative": [-0.57], "low": [-0.6]}
    pd.DataFrame(gate | {"high": [-0.5]}).to_csv(folder / "gate.csv", index=False)
    cost = {"what": ["sampling (8, 16)"], "against": ["bare forward"], "ratio": [1.0312]}
    pd.DataFrame(cost).to_csv(folder / "benchmarks.csv", index=False)
    (folder / "table.md").write_text("| a |\n")
    return tmp_path


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("deme_merged - soup | fid | effect", "−0.0597"),
        ("deme_merged - soup | fid | relative", "−16.0 %"),
        ("deme_merged - soup | kid | share", "20.0 %"),
        ("deme_merged - soup | fid | interval", "[−0.0672, −0.0529]"),
        ("deme_merged - soup | fid | share_interval", "[−20.0 %, −15.0 %]"),
        ("deme_merged - soup | fid | verdict", "different"),
        ("deme_merged - soup | fid | claim", "−17.4 % [−20.0 %, −15.0 %] (*different*)"),
        ("deme_merged - soup | fid | n_units", "8"),
        ("soup | fid_mean", "0.348"),
        ("soup | parameters", "40,000"),
        ("gate plain_routed 4 | relative", "−57.0 %"),
        ("gate plain_routed 4 | interval", "[−60.0 %, −50.0 %]"),
        ("benchmarks sampling (8, 16) / bare forward | ratio", "1.03"),
    ],
)
def test_a_number_is_the_file_s(figures, path, shown):
    marker = f"<!--n fashion8: {path}-->"
    text = f"by {marker}old<!--/n--> and {marker}<!--/n-->.\n"
    filled = readme.fill(text, figures)
    assert filled == f"by {marker}{shown}<!--/n--> and {marker}{shown}<!--/n-->.\n"
    assert readme.fill(filled, figures) == filled


def test_a_table_is_the_whole_file(figures):
    text = "# T\n<!--table fashion8/table.md-->\nold\n\\1<!--/table-->\nend\n"
    filled = readme.fill(text, figures)
    assert filled == "# T\n<!--table fashion8/table.md-->\n| a |\n<!--/table-->\nend\n"
    assert readme.fill(filled, figures) == filled


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "<!--n fashion8: soup - all | fid | effect-->x<!--/n-->",
            "no row 'soup - all | fid'.*soup",
        ),
        ("<!--n fashion8: soup | fid-->x<!--/n-->", "no column 'fid', there are: arm, fid_mean"),
        ("<!--n fashion9: soup | fid_mean-->x<!--/n-->", "fashion9"),
        ("<!--n fashion8: soup-->x<!--/n-->", "no row"),
        ("<!--n fashion8: soup | fid_mean-->x", "has no <!--/n-->"),
        ("<!--table fashion8/no.md-->x<!--/table-->", "no file .*no.md"),
    ],
)
def test_a_marker_that_names_nothing_is_an_error(figures, text, message):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        readme.fill(text, figures)
