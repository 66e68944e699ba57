"""Figures: everything recorded is drawn where it belongs."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

from deme_lib.report import intervals, plots, records, render, tables
from deme_lib.report.plots import style

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def points(ax):
    """[rows, xy, seeds] of the small points, in the order drawn."""
    lines = [line for line in ax.lines if line.get_marker() == "o" and line.get_ms() == 4]
    return np.array([line.get_data() for line in lines])


def ends(ax):
    """[rows, 2] of the intervals along x, in the order drawn."""
    return np.array([bar.lines[2][0].get_segments()[0][:, 0] for bar in ax.containers])


def test_several_cells_have_a_figure_of_their_own(cells):
    found = records.read(cells)
    drawn = render.figures(found)
    assert "cells" in drawn and not drawn.keys() & {"main", "cost", "gate", "loss_per_timestep"}
    ax = drawn["cells"]().axes[0]
    assert [x.get_text() for x in ax.get_yticklabels()] == list(found.titles.values())
    fid = found.of("fid")
    d = fid[["pretrained", "N = 2 / deme_merged"]].sub(fid["all_plain"], axis=0)
    np.testing.assert_allclose(points(ax)[:, 0], d.T)
    assert "one model, all timesteps (0.1" in ax.get_xlabel()


def test_samplers_are_drawn_over_their_steps(cells, change):
    names = {"N = 2": "ddim", "default": "dpm-solver"}
    change(cells, "metrics.csv", lambda f: f.assign(sampler=f["cell"].map(names)))
    found = records.read(cells)
    drawn = render.figures(found)
    assert "samplers" in drawn and "cells" not in drawn
    axes, arms = drawn["samplers"]().axes, ["pretrained", "one model, all timesteps", "DeMe merged"]
    assert [ax.get_title() for ax in axes] == arms
    mine = found.metrics.query("arm == 'pretrained'")["fid"].mean()
    assert axes[0].lines[0].get_ydata() == pytest.approx([mine])


def test_one_training_an_arm_of_ones_own_and_no_comparison_are_drawn(folder, change):
    for name in ("history", "gradients", "activations", "landscape", "task_vectors", "plane"):
        (folder / f"{name}.csv").unlink()
    mine = {"arm": {"all_plain": "mine"}}
    change(folder, "metrics.csv arms.csv losses.csv", lambda f: f.replace(mine))
    none = {"primary_decoupling": [], "primary_merging": [], "exploratory": []}
    change(folder, "run.json", lambda run: run["parameters"].update(none))
    change(folder, "run.json", lambda run: run.update(trainings={"0": {}}))
    (folder / "samples.safetensors").unlink()
    drawn = render.figures(records.read(folder))
    assert drawn.keys() == {"method", "main", "loss_per_timestep", "cost"}
    assert len(drawn["main"]().axes) == 2 and len(drawn["loss_per_timestep"]().axes) == 1
    assert style.of("mine")["color"] == "black"


def test_an_arm_far_off_does_not_squeeze_the_others(folder, change):
    far = {"soup": 9.0}
    change(folder, "metrics.csv", lambda f: f.assign(fid=f["fid"] + f["arm"].map(far).fillna(0)))
    left, right = plots.main(records.read(folder)).axes[:2]
    assert "symmetric log scale" in left.get_xlabel() and right.get_xscale() == "symlog"


def test_main_shows_arms_comparisons_margin_and_verdicts(known):
    known.parameters["confirmation_seeds"] = known.training_seeds[1:]
    figure = plots.main(known)
    arms = [arm for arm in known.titles if arm != "pretrained"]
    rows = tables.table(known)
    np.testing.assert_allclose(ends(figure.axes[0]), rows.loc[arms, ["low", "high"]])
    for (left, right), measure in zip(
        np.reshape(figure.axes, (2, 2)), intervals.JUDGED, strict=True
    ):
        d = known.of(measure).sub(known.of(measure)["pretrained"], axis=0)[arms]
        np.testing.assert_allclose(points(left)[:, 0].T, d)
        found = intervals.comparisons(known).query("measure == @measure")
        named, every = (found[found["kind"] == kind] for kind in ("primary", "estimate"))
        columns = ["low", "high"]  # first the grey bar of all trainings
        np.testing.assert_allclose(ends(right)[::2], every[columns])
        np.testing.assert_allclose(ends(right)[1::2], named[columns])
        said = [t.get_text().replace("\n", " ") for t in right.texts]
        assert [text for text in said if text in set(named["verdict"])] == list(named["verdict"])
        band = right.patches[0].get_extents().transformed(right.transData.inverted())
        margin = named["margin"].iloc[0]
        assert (band.x0, band.x1) == pytest.approx((-margin, margin))
    assert "n = 5,000" in figure.get_supxlabel() and "fashion8-a" in figure.get_supxlabel()


def test_losses_are_relative_to_pretrained(known):
    left, right = plots.loss_per_timestep(known).axes
    losses = known.losses.groupby(["arm", "bin_start"])["loss"].mean().unstack("arm")
    relative = 100 * (losses.div(losses["pretrained"], axis=0) - 1)
    lines = {line.get_label(): line for line in left.lines}
    np.testing.assert_allclose(lines["plain experts, routed"].get_ydata(), relative["plain_routed"])
    np.testing.assert_allclose(lines["DeMe merged"].get_xdata(), losses.index + 25)
    assert "averaged ensemble" not in lines and len(lines) == 8
    assert [line.get_label() for line in right.lines] == [
        "pretrained", "DeMe experts, routed", "DeMe merged", "averaged ensemble",
    ]  # fmt: skip


def test_the_gate_has_every_seed_in_its_range(known):
    d = 100 * intervals.gate(known)
    x, y = points(plots.gate(known).axes[0]).swapaxes(0, 1)  # [ranges x arms, seeds]
    np.testing.assert_allclose(y, np.concatenate([d.xs(k, level="range").T for k in range(1, 5)]))
    assert (x // 250 == np.repeat(range(4), 8)[:, None]).all()


def test_cost_is_in_multiples_of_the_base(known):
    for ax, most, name in zip(plots.cost(known).axes, (4.09, 4), ("40,489", "20"), strict=True):
        drawn = points(ax)
        assert len(drawn) == 9 and drawn[:, 0].max() == pytest.approx(most, rel=0.1)
        assert ax.get_xlabel().endswith(f"1× = {name}")


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
    said = [text.get_text() for text in plots.method(n).axes[0].texts]
    assert sum(text.startswith("$\\times") for text in said) == n


def test_gradients_are_means_over_draws(known):
    gradients = known.looks["gradients"]
    left = plots.gradient_similarity(gradients).axes[0]
    mine = gradients[gradients["model"] == "pretrained"]
    table = mine.groupby(["timestep2", "timestep1"])["cosine"].mean().unstack()
    np.testing.assert_allclose(left.collections[0].get_array(), table)


def test_boxes_are_the_recorded_quantiles(known):
    ax = plots.task_vectors(known.looks["task_vectors"]).axes[0]
    medians = [line.get_ydata()[0] for line in ax.lines if np.ptp(line.get_ydata()) == 0]
    for median in known.looks["task_vectors"]["median"]:
        assert np.isclose(medians, median).any()
    bottom = plots.activations(known.looks["activations"]).axes[2]
    heights = sorted(bar.get_height() for bar in bottom.patches if bar.get_height())
    shares = known.looks["activations"].query("dimension == 'channel'")["share"]
    np.testing.assert_allclose(heights[-len(shares) :], sorted(shares))


def test_planes_mark_the_minimum_of_the_grid(known):
    df, plane = known.looks["landscape"], known.looks["plane"]
    panels = plots.landscape(df).axes[:-1]
    assert [ax.get_title() for ax in panels][:2] == ["all timesteps", "range 1: [0, 250)"]
    assert len({ax.collections[0].norm.vmax for ax in panels}) == 1  # one scale for all
    for ax, (_, part) in zip(panels, df.groupby("range"), strict=True):
        lowest = part.loc[part["loss"].idxmin(), ["a", "b"]]
        assert np.ravel(ax.lines[1].get_data()).tolist() == lowest.tolist()
    lowest = plane.loc[plane["loss"].idxmin(), ["w1", "w2"]]
    assert np.ravel(plots.plane(plane).axes[0].lines[-1].get_data()).tolist() == lowest.tolist()


def test_finetuning_runs_have_the_colours_of_their_arms(known):
    history = known.looks["history"]
    left, right = plots.history(history).axes
    drawn = [line for line in right.lines if len(line.get_xdata()) > 2]
    assert len(drawn) == 14 and len(left.lines[1].get_xdata()) == 16
    colours = {line.get_label(): line.get_color() for line in drawn}
    assert colours["plain experts"] == style.STYLES["plain_routed"][0]
    assert colours["members of the soup"] == style.STYLES["soup"][0]
    assert len(plots.history(history[history["run"] != "baseline"]).axes) == 1
