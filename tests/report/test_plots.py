"""Figures and rendered files: all there, the same bytes twice, and odd inputs work."""

import shutil
from dataclasses import replace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from evidence import SWEEPS, change, write
from safetensors.numpy import load_file, save_file

from deme_lib.experiment.arms import ARMS
from deme_lib.report import intervals, plots, records, render, tables
from deme_lib.report.plots.style import STYLES, symlog_if_wide
from deme_lib.report.records import COLUMNS

matplotlib.use("Agg")

ALWAYS = {"main.png", "comparisons.csv", "comparisons.md"}
ALWAYS |= {f"table.{kind}" for kind in ("csv", "md", "tex")}
FIGURES = ["samples", "loss_per_timestep", "gradient_similarity", "task_vectors", "plane", "gate"]
FIGURES += ["history", "neighbours", "activations", "landscape"]
EXPECTED = ALWAYS | {f"{name}.png" for name in FIGURES} | {"gate.csv", "observations.md"}


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def test_rendering_twice_gives_the_same_bytes(tmp_path):
    for out in ("one", "two"):
        write(tmp_path / out / "records")
        shutil.copytree(SWEEPS / "cuts", tmp_path / out / "sweeps" / "cuts")
        render.render(tmp_path / out)
    written = {p.name for p in (tmp_path / "one").iterdir()}
    assert written == EXPECTED | {"records", "sweeps"}
    sweep = {p.name for p in (tmp_path / "one" / "sweeps").iterdir()}
    assert sweep == {f"cuts{end}" for end in ("", ".csv", ".md", ".tex", ".png")} | {
        "cuts-comparisons.csv",
        "cuts-comparisons.md",
    }
    for path in (tmp_path / "one").rglob("*.*"):
        again = tmp_path / "two" / path.relative_to(tmp_path / "one")
        assert path.read_bytes() == again.read_bytes(), path.name
    assert not plt.get_fignums()
    csv = pd.read_csv(tmp_path / "one" / "table.csv").set_index("arm")
    whole = tables.table(records.read(tmp_path / "one" / "records")).set_index("arm")
    np.testing.assert_allclose(csv["fid_mean"], whole["fid_mean"].astype(float), rtol=1e-5)


def test_small_and_odd_records_render(tmp_path):
    """One seed, N = 1, colour, no search scored by images, a user's model."""
    folder = write(tmp_path / "records", training_seeds=(8,), seeds=(3,)) / "seed-8"
    for name in ("gate", "activations", "landscape", "task_vectors"):
        change(folder / f"{name}.csv", lambda t: t[t["range"] <= 1])
    change(folder / "search.csv", lambda t: t.assign(fid=np.nan))
    change(folder / "history.csv", lambda t: t[(t["run"] != "baseline") | (t["step"] == 0)])
    grey = load_file(folder / "samples.safetensors")
    save_file({arm: x.repeat(3, 1) for arm, x in grey.items()}, folder / "samples.safetensors")
    render.render(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == EXPECTED | {"records"}
    assert "nan" not in (tmp_path / "table.md").read_text()
    assert "nan" not in (tmp_path / "comparisons.md").read_text()


def test_without_optional_records_the_rest_is_rendered(tmp_path):
    write(tmp_path / "records", optional=False)
    render.render(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == ALWAYS | {"records"}
    shutil.copytree(SWEEPS / "cuts", tmp_path / "alone" / "sweeps" / "cuts")
    render.render(tmp_path / "alone")
    assert {p.name for p in (tmp_path / "alone").iterdir()} == {"sweeps"}


def test_every_arm_has_its_own_look():
    assert set(STYLES) >= set(ARMS)
    assert len(set(STYLES.values())) == len(STYLES)


def test_main_and_controls_show_units_intervals_and_the_floor(known):
    arms = [intervals.headline(known, n) for n in intervals.ABLATIONS]
    assert [len(names) for names in arms] == [6, 4]
    every = [arm for arm in known.titles if "@" not in arm]
    main, controls = plots.main(known), plots.controls(known)
    for figure, panels in ((main, arms), (controls, [every])):
        figure.canvas.draw()
        rows, fid = tables.table(known).set_index("arm"), known.by_unit["fid"]["base"]
        axes = figure.axes[: len(panels)]
        for ax, names in zip(axes, panels, strict=True):
            assert [x.get_text() for x in ax.get_yticklabels()] == [known.titles[a] for a in names]
            dots = [line.get_xdata() for line in ax.lines if line.get_marker() == "."]
            for arm, mine in zip(names, dots[: len(names)], strict=True):  # then the legend's
                np.testing.assert_allclose(mine, fid[arm] - fid["pretrained"])
            ends = [bar.lines[2][0].get_segments()[0][:, 0] for bar in ax.containers[1:]]
            expected = rows.loc[names[1:], ["difference_low", "difference_high"]]
            np.testing.assert_allclose(ends, expected.astype(float))
            assert "real images" in ax.texts[-1].get_text()
        texts = [t for ax in axes for t in (*ax.texts, *ax.get_yticklabels()) if t.get_text()]
        texts += [*figure.legends[0].texts, figure.legends[0].get_title()]
        texts = [t.get_window_extent() for t in texts]
        for i, box in enumerate(texts):
            assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
            assert not any(box.overlaps(other) for other in texts[:i])
        assert "n = 5,000" in figure.get_supxlabel() and "fashion8-a" in figure.get_supxlabel()


def test_the_gate_has_a_panel_per_range(known):
    axes = plots.gate(known).axes
    assert [ax.get_title()[:7] for ax in axes] == [f"range {k}" for k in (1, 2, 3, 4)]
    table = intervals.gate(known)
    means = [bar.lines[0].get_ydata()[0] for bar in axes[3].containers[1::2]]
    expected = 100 * table.loc[table["range"] == 4, "relative"]
    np.testing.assert_allclose(means, expected)
    seeds = [len(bar.lines[0].get_ydata()) for bar in axes[3].containers[::2]]
    assert seeds == [8, 8, 8]


def test_horizons_join_copies_of_one_arm(known):
    ax = plots.ema_horizon(known).axes[0]
    assert len(ax.containers) == 4
    soup = next(bar for bar in ax.containers if bar.get_label() == known.titles["soup"])
    rows = tables.table(known).set_index("arm").loc[["soup@0", "soup@0.98", "soup"]]
    np.testing.assert_allclose(soup.lines[0].get_ydata(orig=False), rows["difference"])
    np.testing.assert_allclose(soup.lines[0].get_xdata(orig=False), [1, 50, 200], rtol=0.15)
    ends = np.array([bar[:, 1] for bar in soup.lines[2][0].get_segments()])
    np.testing.assert_allclose(ends, rows[["difference_low", "difference_high"]].astype(float))


def test_finetuning_runs_have_the_colours_of_their_arms(known):
    lines = plots.history(known.history).axes[1].lines
    drawn = {line.get_label(): line.get_color() for line in lines}
    assert drawn["plain experts"] == STYLES["plain_routed"][0]
    assert all(drawn[ARMS[arm].title] == STYLES[arm][0] for arm in ("soup", "all_plain"))


def test_losses_are_relative_to_pretrained_and_means_over_seeds(known):
    bins = {"bin_start": [0, 500], "bin_stop": [500, 1000]}
    df = pd.concat(
        pd.DataFrame({"arm": arm, **bins, "loss": [4, 2] if arm == "pretrained" else loss})
        for arm in known.titles
        for loss in ([1, 2], [3, 4])
    )
    ax, *_ = plots.loss_per_timestep(replace(known, frames=known.frames | {"losses": df})).axes
    (soup,) = [line for line in ax.lines if line.get_label() == ARMS["soup"].title]
    assert soup.get_ydata().tolist() == [0.5, 1.5]


@pytest.mark.parametrize(("far", "scale"), [(0.1, ""), (5.0, ", symmetric log scale")])
def test_one_arm_far_off_squeezes_no_others(far, scale):
    assert symlog_if_wide("x", plt.subplots()[1], pd.Series([0.0, 0.01, -0.02, far])) == scale


@pytest.mark.parametrize("spread", [0.003, 0.0004, 0.2])
def test_plane_levels_are_even_and_told_apart(spread):
    grid = [(a, b, 1 + spread * (a + b) ** 2) for a in (0, 0.5, 1) for b in (0, 0.5, 1)]
    df = pd.DataFrame(grid, columns=["w1", "w2", "loss"]).assign(expert1=1, expert2=2)
    ax = plots.plane(df).axes[1]
    ax.figure.canvas.draw()
    ticks = [t.get_text() for t in ax.get_yticklabels()]
    assert len(set(ticks)) == len(ticks) > 2
    assert np.ptp(np.diff(ax.get_yticks())) < 1e-9


def test_gradients_show_means_and_every_draw():
    t = [50, 150, 600, 900]
    rows = [("pretrained", d, 256, a, b, 0.5 * d) for d in (0, 1) for a in t for b in t]
    full = pd.DataFrame(rows, columns=COLUMNS["gradients"].split())
    figure = plots.gradient_similarity(full)
    labels = [x.get_text() for x in figure.axes[1].get_legend().texts]
    assert labels == ["t in [0, 1000), mean 0.25", "t in [0, 250), mean 0.25"]
    for bars in figure.axes[1].containers:  # two draws of 0 and 0.5
        assert sorted(b.get_height() for b in bars)[-2:] == [0.5, 0.5]
    assert (figure.axes[0].collections[0].get_array() == 0.25).all()  # their mean


def test_activations_show_what_is_recorded(known):
    axes = plots.activations(known.activations).axes
    for ax, dimension in zip(axes[2:], ("channel", "spatial"), strict=True):
        expected = known.activations.loc[known.activations["dimension"] == dimension, "share"]
        shown = [bar.get_height() for bars in ax.containers for bar in bars]
        assert sorted(shown) == pytest.approx(sorted(expected))


def test_a_landscape_marks_the_centre_and_the_minimum_of_every_range(known):
    panels = plots.landscape(known.landscape).axes
    assert len(panels) == 5 and panels[0].get_title().startswith("all timesteps, [0, 1000)")
    for ax, (_, part) in zip(panels, known.landscape.groupby("range"), strict=True):
        centre, lowest = (np.ravel(line.get_data()).tolist() for line in ax.lines)
        assert centre == [0, 0]
        assert lowest == part.loc[part["loss"].idxmin(), ["a", "b"]].tolist()


def test_a_sweep_shows_differences_and_the_base_s_arms():
    found = records.read(SWEEPS / "reweighting" / "records")
    ax, df = plots.sweep(found).axes[0], tables.table(found).set_index("cell")["difference"]
    assert [x.get_text() for x in ax.get_xticklabels()] == [c["cell"] for c in found.sweep["cells"]]
    np.testing.assert_allclose(ax.containers[0].lines[0].get_ydata(orig=False), df.drop("base"))
    lines = [line.get_ydata()[0] for line in ax.lines if "base" in line.get_label()]
    np.testing.assert_allclose(lines, df.loc["base"].iloc[1:].fillna(0))  # but the floor
