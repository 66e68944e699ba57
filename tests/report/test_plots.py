"""Figures: everything recorded is drawn where it belongs, labels do not collide."""

import itertools
from dataclasses import replace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from deme_lib.report import intervals, plots, records, render, tables
from deme_lib.report.plots import style

matplotlib.use("Agg")

FIGURES = {"method", "main", "loss_per_timestep", "cost", "gate", "history", "samples", "plane"}
FIGURES |= {"gradient_similarity", "activations", "landscape", "task_vectors"}
TABLES = {"table.csv", "table.md", "comparisons.csv", "comparisons.md"}


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def points(ax):
    """[seeds, rows] of the small points, in the order drawn."""
    lines = [line for line in ax.lines if line.get_marker() == "o" and line.get_ms() == 4]
    return np.array([line.get_data() for line in lines])


def ends(ax):
    """[rows, 2 ends, xy] of the intervals, in the order drawn."""
    return np.array([bar.lines[2][0].get_segments()[0] for bar in ax.containers])


def texts(figure):
    """(text, extent) of whatever is written, once drawn."""
    figure.canvas.draw()
    outside = set()  # ticks that matplotlib keeps and does not draw
    for axis in (axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)):
        low, high = sorted(axis.get_view_interval())
        outside |= {t.label1 for t in axis.get_major_ticks() if not low <= t.get_loc() <= high}
    found = set(figure.findobj(matplotlib.text.Text)) - outside
    return [
        (t.get_text(), t.get_window_extent()) for t in found if t.get_text() and t.get_visible()
    ]


def test_rendering_twice_gives_the_same_bytes(folder):
    written = []
    for _ in range(2):
        render.render(folder.parent)
        files = [path for path in folder.parent.iterdir() if path.is_file()]
        written.append({path.name: path.read_bytes() for path in files})
    assert written[0] == written[1] and not plt.get_fignums()
    assert written[0].keys() == TABLES | {f"{name}.png" for name in FIGURES}


def test_several_cells_have_a_figure_of_their_own(cells):
    found = records.read(cells)
    assert render.figures(found).keys() == FIGURES - {"samples", "gate", "main", "cost"} - {
        "loss_per_timestep"
    } | {"cells"}
    ax = plots.cells(found).axes[0]
    assert [x.get_text() for x in ax.get_yticklabels()] == list(found.titles.values())
    fid = found.of("fid")
    d = fid[["pretrained", "N = 2 / deme_merged"]].sub(fid["all_plain"], axis=0)
    np.testing.assert_allclose(points(ax)[:, 0], d.T)
    assert "one model, all timesteps (0.471)" in ax.get_xlabel()


def test_what_is_not_recorded_is_not_drawn(folder, change):
    """One training seed, an arm of one's own, nothing named and no look at weights."""
    for name in ("history", "gradients", "activations", "landscape", "task_vectors", "plane"):
        (folder / f"{name}.csv").unlink()
    for name in ("metrics", "arms", "losses"):
        change(folder, f"{name}.csv", lambda f: f.replace({"arm": {"all_plain": "mine"}}))
    none = {"primary_decoupling": [], "primary_merging": [], "exploratory": []}
    change(folder, "run.json", lambda run: run["parameters"].update(none))
    change(folder, "run.json", lambda run: run.update(trainings={"0": {}}))
    drawn = render.figures(records.read(folder))
    assert drawn.keys() == {"method", "main", "loss_per_timestep", "cost", "samples"}
    assert all(draw().axes for draw in drawn.values())
    assert len(drawn["main"]().axes) == len(drawn["loss_per_timestep"]().axes) == 1


def test_an_arm_far_off_does_not_squeeze_the_others(folder, change):
    far = {"soup": 9.0}
    change(folder, "metrics.csv", lambda f: f.assign(fid=f["fid"] + f["arm"].map(far).fillna(0)))
    left, right = plots.main(records.read(folder)).axes
    assert "symmetric log scale" in left.get_xlabel() and right.get_xscale() == "symlog"


def test_every_arm_has_its_own_look():
    assert len(set(style.STYLES.values())) == len(style.STYLES)
    assert style.of("N = 8, PS / soup") == style.of("soup")
    assert style.of("mine")["color"] == "black"


def test_main_shows_arms_comparisons_margin_and_verdicts(known):
    figure = plots.main(known)
    left, right = figure.axes
    fid, rows = known.of("fid"), tables.table(known)
    arms = [arm for arm in known.titles if arm != "pretrained"]
    np.testing.assert_allclose(points(left)[:, 0].T, fid[arms].sub(fid["pretrained"], axis=0))
    np.testing.assert_allclose(ends(left)[:, :, 0], rows.loc[arms, ["low", "high"]])
    named = intervals.comparisons(known).query("kind == 'primary'")
    np.testing.assert_allclose(ends(right)[:, :, 0], named[["low", "high"]])
    said = [t.get_text().replace("\n", " ") for t in right.texts]
    assert [text for text in said if text in set(named["verdict"])] == list(named["verdict"])
    assert f"{known.titles['deme_merged']} − {known.titles['soup']}" in said
    band = right.patches[0].get_extents().transformed(right.transData.inverted())
    margin = named["margin"].iloc[0]
    assert (band.x0, band.x1) == pytest.approx((-margin, margin))
    assert "n = 5,000" in figure.get_supxlabel() and "fashion8-a" in figure.get_supxlabel()


@pytest.mark.parametrize("name", ["main", "gate", "cost", "loss_per_timestep", "landscape"])
def test_no_two_texts_collide_and_none_is_cut(known, name):
    figure = render.figures(known)[name]()
    found = texts(figure)
    for (one, a), (other, b) in itertools.combinations(found, 2):
        assert not a.overlaps(b), (one, other)
    assert all(figure.bbox.x0 <= a.x0 and a.x1 <= figure.bbox.x1 for _, a in found)


def test_losses_are_relative_to_pretrained_and_ranges_numbered(known):
    left, right = plots.loss_per_timestep(known).axes
    losses = known.losses.groupby(["arm", "bin_start"])["loss"].mean().unstack("arm")
    relative = 100 * (losses.div(losses["pretrained"], axis=0) - 1)
    lines = {line.get_label(): line for line in left.lines}
    np.testing.assert_allclose(lines["plain experts, routed"].get_ydata(), relative["plain_routed"])
    np.testing.assert_allclose(lines["DeMe merged"].get_xdata(), losses.index + 25)
    assert "averaged ensemble" not in lines and len(lines) == 6
    assert [line.get_label() for line in right.lines] == [
        "pretrained", "DeMe experts, routed", "DeMe merged", "averaged ensemble",
    ]  # fmt: skip
    assert [text.get_text() for text in left.texts] == [f"range {k}" for k in (1, 2, 3, 4)]


def test_the_gate_has_every_arm_range_and_seed_on_one_marked_scale(known):
    ax, d = plots.gate(known).axes[0], 100 * intervals.gate(known)
    drawn = points(ax)
    assert drawn.shape == (6 * 4, 2, 8)
    np.testing.assert_allclose(drawn[:, 1], d.unstack("range").to_numpy().T)
    assert ax.get_yscale() == "symlog" and "symmetric log scale" in ax.get_ylabel()
    ticks = "−30 −10 −3 −1 −0.3 0 0.3 1 3"
    assert [x.get_text() for x in ax.get_yticklabels()] == ticks.split()


def test_cost_is_in_multiples_of_the_base(known):
    held, calls = plots.cost(known).axes
    for ax, most, name in ((held, 4.09, "40,489"), (calls, 4, "20")):
        drawn = points(ax)
        assert len(drawn) == 7 and drawn[:, 0].max() == pytest.approx(most, rel=0.1)
        assert ax.get_xlabel().endswith(f"1× = {name}")
        assert [x.get_text() for x in ax.get_xticklabels()] == ["1×", "2×", "4×"]


@pytest.mark.parametrize("channels", [1, 3])
def test_samples_show_six_arms_a_difference_and_real_images(known, channels):
    images = {name: np.repeat(x, channels, axis=1) for name, x in known.samples.items()}
    ax = plots.samples(images, known.titles).axes[0]
    names = [x.get_text() for x in ax.get_yticklabels()]
    assert len(names) == 8 and names[0] == "pretrained" and names[-1] == "training images"
    difference = abs(images["deme_merged"][:8].astype(int) - images["pretrained"][:8])
    gain = int(names[6].rpartition(" × ")[2])
    sheet = ax.images[0].get_array()
    assert sheet.shape[:2] == (8 * 9, 8 * 9)  # 8 pixels and a gap
    shown = np.reshape(sheet[54:62, 18:26], (8, 8, channels))
    np.testing.assert_array_equal(shown, np.minimum(gain * difference[2], 255).transpose(1, 2, 0))


@pytest.mark.parametrize("n", [1, 4, 8])
def test_the_method_shows_every_expert(n):
    figure = plots.method(n)
    said = [text.get_text() for text in figure.axes[0].texts]
    assert sum(f"$\\times\\,w_{{{k}}}$" in said for k in range(1, n + 1)) == n
    assert any("merged" in text for text in said) and any("routed" in text for text in said)
    inside = [box for _, box in texts(figure)]
    assert all(figure.bbox.contains(box.x0, box.y0) for box in inside)
    assert all(figure.bbox.contains(box.x1, box.y1) for box in inside)


def test_gradients_are_means_over_draws_on_a_scale_that_is_told(known):
    figure = plots.gradient_similarity(known.gradients)
    left, right = figure.axes[:2]
    mine = known.gradients[known.gradients["model"] == "pretrained"]
    table = mine.groupby(["timestep2", "timestep1"])["cosine"].mean().unstack()
    np.testing.assert_allclose(left.collections[0].get_array(), table)
    off = table.where(~np.eye(len(table), dtype=bool))
    low, high = left.collections[0].get_clim()
    assert low == -high and high >= np.nanmax(off.abs())
    assert "off the diagonal\n−0." in figure.axes[4].get_ylabel()
    assert right.get_xlabel() == "cosine of two different timesteps"
    assert any("[0, 250)" in text.get_text() for text in right.get_legend().texts)


def test_boxes_are_the_recorded_quantiles(known):
    ax = plots.task_vectors(known.task_vectors).axes[0]
    medians = [line.get_ydata()[0] for line in ax.lines if np.ptp(line.get_ydata()) == 0]
    for median in known.task_vectors["median"]:
        assert np.isclose(medians, median).any()
    tops = plots.activations(known.activations).axes
    assert [ax.get_title() for ax in tops[:2]] == ["means of channels", "means of positions"]
    heights = sorted(bar.get_height() for bar in tops[2].patches if bar.get_height())
    shares = known.activations.query("dimension == 'channel'")["share"]
    np.testing.assert_allclose(heights[-len(shares) :], sorted(shares))


def test_planes_mark_the_minimum_of_the_grid(known):
    df = known.landscape
    panels = plots.landscape(df).axes[:-1]
    assert [ax.get_title() for ax in panels][:2] == ["all timesteps", "range 1: [0, 250)"]
    norms = {(ax.collections[0].norm.vmin, ax.collections[0].norm.vmax) for ax in panels}
    most = max((part["loss"] / part.query("a == 0 and b == 0")["loss"].item()).max()
               for _, part in df.groupby("range"))  # fmt: skip
    assert len(panels) == 5 and norms == {(1, most)}  # one scale for all
    for ax, (_, part) in zip(panels, df.groupby("range"), strict=True):
        star = ax.lines[1]
        assert not star.get_clip_on()
        lowest = part.loc[part["loss"].idxmin()]
        assert np.ravel(star.get_data()).tolist() == lowest[["a", "b"]].tolist()
    ax, lowest = plots.plane(known.plane).axes[0], known.plane.loc[known.plane["loss"].idxmin()]
    assert np.ravel(ax.lines[-1].get_data()).tolist() == lowest[["w1", "w2"]].tolist()
    assert [text.get_text() for text in ax.texts] == ["pretrained", "expert 1", "expert 4"]


def test_finetuning_runs_have_the_colours_of_their_arms(known):
    left, right = plots.history(known.history).axes
    drawn = [line for line in right.lines if len(line.get_xdata()) > 2]
    assert len(drawn) == 13 and len(left.lines[1].get_xdata()) == 16
    colours = {line.get_label(): line.get_color() for line in drawn}
    assert colours["plain experts"] == style.STYLES["plain_routed"][0]
    assert colours["members of the soup"] == style.STYLES["soup"][0]
    assert colours["one model, all timesteps"] == style.STYLES["all_plain"][0]


@pytest.mark.filterwarnings("error")
def test_small_or_flat_records_are_drawn(known):
    """No pretraining known, a loss that hardly changes, four timesteps, no floor."""
    only = known.history[known.history["run"] != "baseline"]
    assert len(plots.history(only).axes) == 1
    one = [part.drop(columns="cell") for _, part in only.groupby("run")]  # as notebooks read them
    assert len(plots.history(pd.concat(one)).axes[0].lines) == 14
    flat = known.landscape.assign(loss=lambda x: 1 + 1e-3 * x["a"] ** 2)
    few = known.gradients[known.gradients[["timestep1", "timestep2"]].isin([24, 974]).all(axis=1)]
    unknown = replace(known, frames=known.frames | {"floor": known.floor[:0]})
    for figure in (
        plots.landscape(flat),
        plots.gradient_similarity(few),
        plots.main(unknown),
    ):
        figure.canvas.draw()
