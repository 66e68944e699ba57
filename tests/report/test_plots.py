"""Figures and rendered files: all there, the same bytes twice, and odd inputs work."""

from __future__ import annotations

import subprocess
import sys

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import synthetic

from deme_lib.experiment.arms import ARMS, of_ablation
from deme_lib.report import comparisons, plots, render, sweep_tables, tables

matplotlib.use("Agg")

FIGURES = ["main", "samples", "loss_per_timestep", "gradient_similarity", "task_vectors"]
FIGURES += ["plane", "cost", "search", "pretraining", "neighbours", "activations", "landscape"]
TABLES = ["ablation1", "ablation2"]
EXPECTED = {
    *(f"{name}.png" for name in FIGURES),
    *(f"{name}.{kind}" for name in TABLES for kind in ("csv", "md", "tex")),
    *("paired.csv", "paired.md", "verdicts.md", "questions.md"),
}


def caption(figure):
    """The caption under a figure, on one line."""
    return figure.get_supxlabel().replace("\n", " ")


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def test_rendering_twice_gives_the_same_bytes(tmp_path):
    records = synthetic.write(tmp_path / "records")
    for out in ("one", "two"):
        render.render(records, tmp_path / out)
    assert {p.name for p in (tmp_path / "one").iterdir()} == EXPECTED
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    assert not plt.get_fignums()


def test_small_and_odd_records_render(tmp_path):
    """Two seeds, N = 1, colour, no second features, no pretraining, two bins, two points."""
    odd = {"seeds": (3, 8), "n_ranges": 1, "channels": 3, "second": False, "history": False}
    records = synthetic.write(tmp_path / "records", **odd, points=2, bins=2, merge="uniform")
    search = pd.read_csv(records / "search.csv")
    search.iloc[:0].to_csv(records / "search.csv", index=False)
    render.render(records, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == EXPECTED
    assert "nan" not in (tmp_path / "out" / "paired.md").read_text()
    assert "FID (" not in (tmp_path / "out" / "ablation1.md").read_text()
    assert "T/4" not in caption(plots.loss_per_timestep(tables.read(records).losses))
    assert "the search chose no merge" not in (tmp_path / "out" / "verdicts.md").read_text()


def test_tables_show_the_numbers_of_the_records(tmp_path):
    records = synthetic.write(tmp_path / "records")
    render.render(records, tmp_path)
    known = tables.ablation(tables.read(records), 1).set_index("arm")
    csv = pd.read_csv(tmp_path / "ablation1.csv").set_index("arm")
    np.testing.assert_allclose(csv["fid_mean"], known["fid_mean"].astype(float), rtol=1e-5)
    row = next(x for x in (tmp_path / "ablation1.md").read_text().splitlines() if "searched)" in x)
    mean, kid = known.loc["merged", ["fid_mean", "kid_mean"]]
    assert f"{mean:.3f} ±" in row and f"| {1000 * kid:.1f} ± " in row
    assert f"{known.loc['merged', 'fid_second_mean']:.3f} ±" in row
    assert "| FID (digits-b) ↓ |" in (tmp_path / "ablation1.md").read_text()
    assert "| −0.3 |" in (tmp_path / "ablation1.md").read_text()
    tex = (tmp_path / "ablation1.tex").read_text()
    assert "±" not in tex and "DeMe merged (searched) & " in tex


def test_every_arm_has_its_own_look():
    assert set(plots.STYLES) == set(ARMS)
    assert len({marker for _, marker, _ in plots.STYLES.values()}) == len(ARMS)
    for number in tables.ABLATIONS:
        colours = [plots.STYLES[arm.name][0] for arm in of_ablation(number, "min-snr")]
        assert len(set(colours)) == len(colours)


def test_losses_are_relative_to_pretrained():
    bins = {"bin_start": [0, 500] * 2, "bin_stop": [500, 1000] * 2}
    df = pd.DataFrame({"arm": ["pretrained"] * 2 + ["expert 1"] * 2, **bins, "loss": [4, 2, 2, 3]})
    figure = plots.loss_per_timestep(df)
    line = next(x for x in figure.axes[0].lines if x.get_label() == "expert 1")
    assert line.get_ydata().tolist() == [0.5, 1.5]
    with pytest.raises(ValueError, match="pretrained"):
        plots.loss_per_timestep(df[df["arm"] != "pretrained"])


def test_shares_of_the_loss_weigh_bins_by_width():
    edges = [0, 250, 500, 750, 1000]
    bins = {"bin_start": edges[:-1], "bin_stop": edges[1:]}
    df = pd.DataFrame({"arm": "pretrained", **bins, "loss": [6.0, 2.0, 1.0, 1.0]})
    text = caption(plots.loss_per_timestep(df))
    assert "60.0% lies in t below 250" in text and "10.0% in t from 750" in text
    wide = df[df["bin_start"] != 500].replace({"bin_stop": {500: 750}})  # 250 x 6, 500 x 2, 250 x 1
    assert "54.5% lies" in caption(plots.loss_per_timestep(wide))


def test_cost_bars_are_paired_intervals(tmp_path):
    known = tables.read(synthetic.write(tmp_path))
    ax = plots.cost(known).axes[0]
    bars = {c.get_label(): c for c in ax.containers}
    d = comparisons.differences(known, "routed", "pretrained", "fid")
    ends = bars["DeMe routed"].lines[2][0].get_segments()[0][:, 1]
    assert np.ptp(ends) == pytest.approx(2 * comparisons.paired_interval(d, 0.95)[1])
    assert "paired t" in ax.get_ylabel()


@pytest.mark.parametrize("spread", [0.003, 0.0004, 0.2])
def test_plane_levels_are_even_and_told_apart(spread):
    grid = [(a, b, 1 + spread * (a + b) ** 2) for a in (0, 0.5, 1) for b in (0, 0.5, 1)]
    df = pd.DataFrame(grid, columns=["w1", "w2", "loss"]).assign(expert1=1, expert2=2)
    ax = plots.plane(df).axes[1]
    ax.figure.canvas.draw()
    ticks = [t.get_text() for t in ax.get_yticklabels()]
    assert len(set(ticks)) == len(ticks) > 2
    assert np.ptp(np.diff(ax.get_yticks())) < 1e-9
    assert "not FID" in ax.get_ylabel()


def test_main_prints_levels_and_everything_fits(tmp_path):
    figure = plots.main(tables.read(synthetic.write(tmp_path)))
    figure.canvas.draw()
    texts = [t for ax in figure.axes for t in ax.texts]
    assert sum(t.get_text().count("(97.5 %)") for t in texts) == 2
    for extent in (t.get_window_extent() for t in texts):
        assert figure.bbox.x0 <= extent.x0 and extent.x1 <= figure.bbox.x1
    assert "not training, the search, the data split" in caption(figure)


def test_gradient_pairs_are_counted_once():
    t = [50, 150, 600, 900]
    rows = [("pretrained", d, 256, a, b, 0.5 * d) for d in (0, 1) for a in t for b in t]
    full = pd.DataFrame(rows, columns=tables.COLUMNS["gradients"].split())
    for df in (full, full[full["timestep1"] <= full["timestep2"]]):
        figure = plots.gradient_similarity(df)
        labels = [x.get_text() for x in figure.axes[1].get_legend().texts]
        assert labels == [f"t in [0, {x}): {n} pairs, mean 0.25" for x, n in ((1000, 6), (250, 1))]
        assert (figure.axes[0].collections[0].get_array() == 0.25).all()  # the mean of two draws
        assert "n = 256 training images per gradient, without projections; 2 noise" in caption(
            figure
        )


def test_gradients_have_a_row_of_panels_per_model(tmp_path):
    df = tables.read(synthetic.write(tmp_path)).gradients
    titles = [ax.get_title() for ax in plots.gradient_similarity(df).axes if ax.get_title()]
    assert titles == ["pretrained model (paper: Fig. 1a)", "merged model (paper: Fig. 1a)"]


def test_activations_show_what_is_recorded(tmp_path):
    df = tables.read(synthetic.write(tmp_path)).activations
    axes = plots.activations(df).axes
    for ax, dimension in zip(axes[2:], ("channel", "spatial"), strict=True):
        expected = df[df["dimension"] == dimension]["share"]
        assert sorted(bar.get_height() for bar in ax.patches) == pytest.approx(sorted(expected))
    assert [x.get_text() for x in axes[2].get_xticklabels()] == list(df["block"].unique())


def test_a_landscape_marks_the_centre_and_the_minimum_of_every_range(tmp_path):
    df = tables.read(synthetic.write(tmp_path)).landscape
    panels = [ax for ax in plots.landscape(df).axes if ax.get_visible()]
    assert len(panels) == 5 and panels[0].get_title().startswith("all timesteps, [0, 1000)")
    assert panels[2].get_title().startswith("range 2: t in [250, 500)")
    for ax, (_, part) in zip(panels, df.groupby("range"), strict=True):
        centre, lowest = (np.ravel(line.get_data()).tolist() for line in ax.lines)
        assert centre == [0, 0]
        assert lowest == part.loc[part["loss"].idxmin(), ["a", "b"]].tolist()


@pytest.mark.parametrize("name", ["gradients", "activations", "landscape", "plane", "task_vectors"])
def test_captions_say_whether_the_paper_s_observation_is_seen(tmp_path, name):
    known = tables.read(synthetic.write(tmp_path))
    draw = {"gradients": plots.gradient_similarity}.get(name) or getattr(plots, name)
    assert "een here: " in caption(draw(getattr(known, name), "digits"))


def test_a_sweep_shows_paired_differences_and_the_base_s_arms(tmp_path):
    beside = ("pretrained", "all_plain")
    synthetic.write_sweep(tmp_path, beside=beside)
    df = sweep_tables.table(sweep_tables.read(tmp_path, "techniques"))
    ax = plots.sweep(df, "techniques").axes[0]
    assert [x.get_text() for x in ax.get_xticklabels()] == list(df["cell"].unique()[1:])
    bars = {c.get_label(): c.lines[0].get_ydata(orig=False) for c in ax.containers}
    for arm, title in (("routed", "DeMe routed"), ("merged", "DeMe merged")):
        np.testing.assert_allclose(bars[title], df.loc[df["arm"] == arm, "difference"])
    lines = {x.get_label(): x.get_ydata()[0] for x in ax.lines if "base" in x.get_label()}
    plain = df.loc[df["arm"] == "all_plain", "difference"].item()
    assert lines == {"pretrained (the base)": 0, "all timesteps, no technique (the base)": plain}
    assert ax.get_yscale() == "linear"


def test_a_sweep_with_a_broken_cell_is_drawn_on_a_wider_scale(tmp_path):
    synthetic.write_sweep(tmp_path, fid={"N=8, PS": 90.0})
    df = sweep_tables.table(sweep_tables.read(tmp_path, "techniques"))
    ax = plots.sweep(df, "techniques").axes[0]
    assert ax.get_yscale() == "symlog" and "symmetric log scale" in ax.get_ylabel()
    assert df["difference"].max() < ax.get_ylim()[1]


def test_a_report_includes_its_sweeps(tmp_path):
    records = synthetic.write_sweep(synthetic.write(tmp_path / "records"))
    render.render(records, tmp_path)
    assert len(list((tmp_path / "sweeps").iterdir())) == 5


def test_a_flat_plane_and_an_outlier_draw(tmp_path):
    flat = pd.DataFrame(
        {"w1": [0, 1, 0, 1], "w2": [0, 0, 1, 1], "loss": [1.0] * 4, "expert1": 1, "expert2": 4}
    )
    plots.plane(flat)
    level = pd.DataFrame([(0, 0, 9, a, b, 1.0) for a in (-1, 0, 1) for b in (-1, 0, 1)])
    plots.landscape(level.set_axis(tables.COLUMNS["landscape"].split(), axis=1))
    known = tables.read(synthetic.write(tmp_path, fid={"averaged": 60.0}))
    assert plots.main(known).axes[0].get_xscale() == "symlog"
    assert plots.cost(known).axes[0].get_yscale() == "log"


def test_tables_and_plots_need_no_torch():
    code = "import sys, deme_lib.report; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
