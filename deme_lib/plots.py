"""DataFrames to figures: one function per figure, one colour and marker per arm everywhere.

Nothing is read or written here; a caller shows or saves the Figure that comes back. Columns are
those of ``tables.COLUMNS``.
"""

from __future__ import annotations

import json
import re
import textwrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.interpolate import RegularGridInterpolator
from scipy.stats import spearmanr

from . import tables
from .arms import ARMS, SEARCHES

_LEGEND = {"ncols": 2, "frameon": False, "fontsize": 9, "columnspacing": 1, "handlelength": 2.6}
_C = sns.color_palette("colorblind").as_hex()
STYLES = {
    "pretrained": ("#6e6e6e", "o", "-"),
    "all_plain": (_C[1], "s", "--"),
    "all_same": (_C[3], "D", "--"),
    "all_scaled": (_C[5], "d", "--"),
    "soup_uniform": (_C[6], "<", ":"),
    "soup": (_C[4], "v", ":"),
    "routed": (_C[2], "^", "-"),
    "merged_uniform": (_C[9], "h", "-"),
    "merged": (_C[0], "*", "-"),
    "averaged": (_C[3], "P", "-."),
    "output_merge": (_C[1], "X", "-."),
    "one_scaled": (_C[4], ">", (0, (1, 3))),
    "best_single": (_C[5], "p", (0, (1, 3))),
}
"""Arm -> (colour, marker, line style); a colour repeats only between the two ablations."""


def main(records: tables.Records) -> Figure:
    """Both ablations: FID of every arm minus the pretrained model's, paired by sampling seed."""
    counts = [len(records.arms_of(n)) for n in tables.ABLATIONS]
    size, ratios = (10, 2.6 + 0.34 * sum(counts)), [c + 1 for c in counts]
    figure, axes = _subplots(len(counts), 1, size, height_ratios=ratios, sharex=True)
    for number, ax in zip(tables.ABLATIONS, axes.flat, strict=True):
        _ablation_panel(ax, records, number)
        _panel_title(ax, records, number)
    _symlog_if_wide(axes.flat[0], records)
    scale = ", symmetric log scale" if axes.flat[0].get_xscale() == "symlog" else ""
    what = f"FID minus the pretrained model's{scale}"
    axes.flat[-1].set_xlabel(f"← better      {what}      worse →")
    level = f"{100 * records.parameters['confidence']:g} %"
    note = (
        f"Dots: sampling seeds; symbols: mean with {level} paired t interval (uncorrected; the "
        "primary comparisons, printed above each panel, are corrected); dotted: DeMe merged. "
        "Intervals cover sampling noise only. "
    )
    return _captioned(figure, note + tables.setting(records) + ".")


def _ablation_panel(ax: plt.Axes, records: tables.Records, number: int) -> None:
    arms, rows = records.arms_of(number), tables.ablation(records, number).iloc[:-1]
    for y, arm in enumerate(arms):
        d = tables.differences(records, arm, "pretrained", "fid")
        mean, half = tables.paired_interval(d, records.parameters["confidence"])
        colour, marker, _ = STYLES.get(arm, _unknown(y))
        ax.plot(d, np.full(d.size, y + 0.26), ".", color=colour, alpha=0.6, ms=5)
        ax.errorbar(mean, y, xerr=half, color=colour, marker=marker, ms=9, capsize=4, lw=2)
        if arm == "merged":
            ax.axvline(mean, color=colour, lw=1.2, ls=":", zorder=0)
    ax.axvline(0, color=STYLES["pretrained"][0], lw=1, zorder=0)
    ax.set_yticks(range(len(arms)), [records.titles[arm] for arm in arms])
    ax.set_ylim(len(arms) - 0.4, -0.6)
    pairs = tables.comparisons(records, number)
    compared = {arm for a, b, kind, _ in pairs if kind == "primary" for arm in (a, b)}
    for arm, label in zip(arms, ax.get_yticklabels(), strict=True):
        label.set_weight("bold" if arm in compared else "normal")
    ax.grid(axis="x", color="0.92")
    ax.tick_params(labelbottom=True)
    right = ax.twinx()
    right.set_ylim(ax.get_ylim())
    fids = zip(rows["fid_mean"], rows["fid_sd"], strict=True)
    right.set_yticks(
        range(len(arms)), [f"{tables.number(m)} ± {tables.number(s)}" for m, s in fids]
    )
    right.tick_params(length=0)
    ax.text(1.012, -0.02, "FID ± sd", transform=ax.transAxes, va="top", fontsize=10, color="0.3")


def _panel_title(ax: plt.Axes, records: tables.Records, number: int) -> None:
    paired, lines = tables.paired(records, number), []
    for _, row in paired[paired["kind"] == "primary"].iterrows():
        names = f"{records.titles[row['a']]} − {records.titles[row['b']]}"
        difference = tables.plus_minus(row["fid"], row["fid_halfwidth"], signed=True)
        lines.append(f"{names}: {difference}, {row['outcome']}")
    ax.text(0, 1.02, "\n".join(lines), transform=ax.transAxes, va="bottom", fontsize=10)
    heading = f"Ablation {number}: {tables.ABLATIONS[number]}"
    ax.set_title(heading, loc="left", weight="bold", pad=8 + 14 * len(lines))


def samples(images: dict[str, np.ndarray], titles: dict[str, str], caption: str = "") -> Figure:
    """A row of images per arm, from the same noise for every arm.

    Args:
        images: arm -> [K, C, H, W] uint8; "real" is training data.
        titles: arm -> title; gives the order of the rows too.
    """
    names = [a for a in (*titles, "real") if a in images]
    names += [a for a in images if a not in names]
    strips = [_strip(images[name]) for name in names]  # each [H + gap, K (W + gap), 3]
    height, width = strips[0].shape[:2]
    left, shown, below = 2.6, 6.9, 0.4  # inches
    tall = shown * height * len(names) / width
    figure, axes = _subplots(1, 1, (left + shown + 0.1, tall + below))
    figure.set_layout_engine("none")
    ax = axes.flat[0]
    wide, high = figure.get_size_inches()
    ax.set_position([left / wide, below / high, shown / wide, tall / high])
    ax.imshow(np.concatenate(strips), interpolation="nearest", aspect="auto")
    ax.set_xticks([])
    centres = [height * (i + 0.5) - 0.5 for i in range(len(names))]
    ax.set_yticks(centres, [titles.get(name, f"{name} images") for name in names])
    ax.tick_params(length=0)
    sns.despine(ax=ax, left=True, bottom=True)
    return _captioned(figure, f"{caption}. Columns share their noise, except for real images.")


def _strip(images: np.ndarray) -> np.ndarray:
    gap = max(1, images.shape[-1] // 16)
    padded = np.pad(images, ((0, 0), (0, 0), (0, gap), (0, gap)), constant_values=255)
    row = np.concatenate([image.transpose(1, 2, 0) for image in padded], axis=1)
    return row if row.shape[2] == 3 else np.repeat(row[:, :, :1], 3, axis=2)


def loss_per_timestep(df: pd.DataFrame, caption: str = "") -> Figure:
    """Denoising loss of every arm over the pretrained model's, per bin of timesteps."""
    table = df.assign(t=(df["bin_start"] + df["bin_stop"]) / 2)
    table = table.pivot(index="t", columns="arm", values="loss")
    if "pretrained" not in table:
        raise ValueError("losses are shown relative to the arm 'pretrained', which has no rows")
    ratio = table.div(table["pretrained"], axis=0)
    panels = _by_ablation(df["arm"].unique())
    figure, axes = _subplots(1, len(panels), (max(5 * len(panels), 7), 5.4), sharey=True)
    for ax, (title, arms) in zip(axes.flat, panels.items(), strict=True):
        for i, arm in enumerate(arms):
            colour, marker, line = STYLES.get(arm, _unknown(i))
            ax.plot(
                ratio.index,
                ratio[arm],
                color=colour,
                marker=marker,
                ls=line,
                ms=5,
                label=_title(arm),
            )
        ax.set(title=title, xlabel="timestep t")
        ax.legend(loc="upper center", bbox_to_anchor=(0.48, -0.14), **_LEGEND)
    axes.flat[0].set_ylabel("loss / pretrained model's loss\n(below 1: better)")
    return _captioned(figure, caption)


def gradient_similarity(
    df: pd.DataFrame, caption: str = "", num_train_timesteps: int = 1000
) -> Figure:
    """Fig. 1a: cosines of the gradients at two timesteps, as a map and as two histograms."""
    mirrored = df.rename(columns={"timestep1": "timestep2", "timestep2": "timestep1"})
    full = pd.concat([df, mirrored]).drop_duplicates(["timestep1", "timestep2"])
    table = full.pivot(index="timestep2", columns="timestep1", values="cosine")
    figure, axes = _subplots(1, 2, (10, 4.6), width_ratios=[1.1, 1])
    left, right = axes.flat
    t = table.index.to_numpy()
    drawn = left.pcolormesh(t, t, table.to_numpy(), cmap="vlag", vmin=-1, vmax=1)
    figure.colorbar(drawn, ax=left, label="cosine")
    left.set(xlabel="timestep", ylabel="timestep", title="gradient similarity (paper: Fig. 1a)")
    pairs = full[full["timestep1"] < full["timestep2"]]
    bins = np.linspace(min(-0.1, pairs["cosine"].min()), 1, 23)
    for stop, colour in ((num_train_timesteps, _C[7]), (num_train_timesteps / 4, _C[0])):
        cosines = pairs.loc[pairs["timestep2"] < stop, "cosine"]
        label = f"t in [0, {stop:g}): {len(cosines)} pairs"
        if len(cosines):
            label += f", mean {cosines.mean():.2f}"
            weights = np.full(len(cosines), 1 / len(cosines))
            right.hist(cosines, bins, weights=weights, color=colour, alpha=0.6, label=label)
        else:
            right.plot([], [], "s", color=colour, alpha=0.6, label=label)
    right.set(xlabel="cosine of two different timesteps", ylabel="share of pairs")
    right.legend(loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    return _captioned(figure, caption)


def task_vectors(df: pd.DataFrame, caption: str = "") -> Figure:
    """Fig. 6b: values of the task vectors per block and range, boxes from stored quantiles."""
    blocks, ranges = list(df["block"].unique()), sorted(df["range"].unique())
    colours = sns.color_palette("viridis", len(ranges))
    figure, axes = _subplots(1, 1, (10, 4.6))
    ax, width = axes.flat[0], 0.8 / len(ranges)
    for i, (k, colour) in enumerate(zip(ranges, colours, strict=True)):
        part = df[df["range"] == k]
        boxes = [
            {
                "med": r["median"],
                "q1": r["q25"],
                "q3": r["q75"],
                "whislo": r["q05"],
                "whishi": r["q95"],
                "fliers": [],
            }
            for _, r in part.iterrows()
        ]
        at = [blocks.index(b) + (i - (len(ranges) - 1) / 2) * width for b in part["block"]]
        ax.bxp(
            boxes,
            positions=at,
            widths=0.85 * width,
            showfliers=False,
            patch_artist=True,
            boxprops={"facecolor": colour, "lw": 0.8},
            medianprops={"color": "white", "lw": 1.5},
            manage_ticks=False,
        )
        ax.fill_between([], [], color=colour, label=f"range {k} of {len(ranges)}")
    ax.axhline(0, color="0.7", lw=0.8, zorder=0)
    ax.set_xticks(range(len(blocks)), blocks)
    ax.set_ylabel("value of the task vector")
    ax.legend(
        loc="lower center",
        bbox_to_anchor=(0.5, 1),
        ncols=min(len(ranges), 4),
        frameon=False,
        title="task vectors by block (paper: Fig. 6b)",
    )
    return _captioned(
        figure, f"{caption}. Boxes: quartiles, whiskers: 5 % to 95 %; range 1: low t."
    )


def plane(df: pd.DataFrame, caption: str = "") -> Figure:
    """Fig. 6a: loss over the plane of two task vectors, relative to the pretrained model's."""
    table = df.pivot(index="w2", columns="w1", values="loss")
    w1, w2, loss = table.columns.to_numpy(), table.index.to_numpy(), table.to_numpy()
    ratio = loss / RegularGridInterpolator((w2, w1), loss)([[0, 0]])[0]
    figure, axes = _subplots(1, 1, (7.5, 6))
    ax = axes.flat[0]
    levels = np.unique(np.quantile(ratio, np.linspace(0, 1, 13)))
    if levels[-1] - levels[0] > 1e-9:
        filled = ax.contourf(w1, w2, ratio, levels, cmap="viridis_r")
        lines = ax.contour(w1, w2, ratio, levels[1:-1:2], colors="white", linewidths=0.7)
        ax.clabel(lines, fmt="%.3f", fontsize=9)
    else:
        filled = ax.pcolormesh(w1, w2, ratio, cmap="viridis_r", shading="nearest")
    figure.colorbar(filled, ax=ax, label="loss / pretrained model's loss", format="%.3f")
    first, second = df["expert1"].iloc[0], df["expert2"].iloc[0]
    names = {(0, 0): "pretrained", (1, 0): f"expert {first}", (0, 1): f"expert {second}"}
    for (x, y), name in names.items():
        ax.plot(x, y, "o", color="black", mec="white", ms=8)
        _label(ax, x, y, name)
    row, column = np.unravel_index(ratio.argmin(), ratio.shape)
    ax.plot(w1[column], w2[row], "*", color=_C[3], mec="white", ms=17)
    _label(ax, w1[column], w2[row], f"minimum {ratio.min():.4f}", -18 if row else 8)
    ax.set(xlabel=f"$w_1$ (expert {first})", ylabel=f"$w_2$ (expert {second})")
    ax.set_title("plane of two task vectors (paper: Fig. 6a)")
    return _captioned(figure, caption)


def cost(records: tables.Records) -> Figure:
    """FID against what an arm costs: parameters held, denoiser calls, training steps."""
    every = [tables.ablation(records, number).iloc[:-1] for number in tables.ABLATIONS]
    table = pd.concat(every).drop_duplicates("arm")
    costs = {
        "parameters": "parameters held",
        "calls_per_image": "denoiser calls per image",
        "training_steps": "training steps after pretraining",
    }
    figure, axes = _subplots(1, 3, (10, 5.2), sharey=True)
    for ax, (column, label) in zip(axes.flat, costs.items(), strict=True):
        _cost_panel(ax, table, column)
        ax.set_xlabel(label)
    axes.flat[0].set_ylabel("FID, mean ± sd (lower is better)")
    if table["fid_mean"].max() > 10 * table["fid_mean"].min():
        axes.flat[0].set_yscale("log")
    handles, labels = _shared_legend(axes)
    order = [labels.index(title) for title in table["title"]]
    handles = [handles[i] for i in order]
    figure.legend(handles, table["title"], loc="outside upper center", **{**_LEGEND, "ncols": 4})
    note = "Costs in ascending order, not to scale; equal ones side by side. "
    return _captioned(figure, f"{note}{tables.setting(records)}.")


def _cost_panel(ax: plt.Axes, table: pd.DataFrame, column: str) -> None:
    """One column of points per distinct cost."""
    groups = list(table.groupby(column, sort=True))
    for x, (_, group) in enumerate(groups):
        places = x + 0.8 * (np.arange(1, len(group) + 1) / (len(group) + 1) - 0.5)
        for i, (at, (_, row)) in enumerate(zip(places, group.iterrows(), strict=True)):
            colour, marker, _ = STYLES.get(row["arm"], _unknown(i))
            style = {"color": colour, "marker": marker, "ls": "", "ms": 8, "lw": 1}
            ax.errorbar(at, row["fid_mean"], row["fid_sd"], capsize=2, label=row["title"], **style)
        if x:
            ax.axvline(x - 0.5, color="0.9", lw=1)
    labels = [f"{cost:,.0f}" for cost, _ in groups]
    ax.set_xticks(range(len(groups)), labels, rotation=25 if len(groups) > 3 else 0)
    ax.set_xlim(-0.5, len(groups) - 0.5)
    ax.tick_params(axis="x", length=0)


def search(df: pd.DataFrame, caption: str = "") -> Figure:
    """Held-out loss against FID of the candidates that were scored by images, per search."""
    scored = df.dropna(subset=["fid"])
    names = list(scored["search"].unique()) or ["none"]
    columns = min(len(names), 2)
    rows = -(-len(names) // columns)
    figure, axes = _subplots(rows, columns, (max(4.5 * columns, 6), 0.8 + 3.1 * rows))
    for ax in axes.flat[len(names) :]:
        ax.set_visible(False)
    for ax, name in zip(axes.flat, names, strict=False):
        _search_panel(ax, scored[scored["search"] == name], SEARCHES.get(name, name))
    figure.legend(*_shared_legend(axes), loc="outside upper center", ncols=3, frameon=False)
    return _captioned(figure, caption)


def _search_panel(ax: plt.Axes, part: pd.DataFrame, title: str) -> None:
    if part.empty:
        _empty(ax, "no candidate was scored by images")
        return
    base = part[[not any(json.loads(w)) for w in part["weights"]]]
    chosen = part[part["chosen"] == 1]
    ax.plot(part["loss"], part["fid"], "o", color=_C[0], alpha=0.7, label="candidate")
    ax.plot(base["loss"], base["fid"], "s", color="0.4", label="all weights 0")
    ax.plot(chosen["loss"], chosen["fid"], "*", color=_C[3], mec="black", ms=15, label="chosen")
    if min(part["loss"].nunique(), part["fid"].nunique()) > 2:
        title += f"\nrank correlation {spearmanr(part['loss'], part['fid'])[0]:.2f}"
    ax.set_title(title, fontsize=10)
    ax.set(xlabel="held-out loss", ylabel="FID on search images")
    ax.ticklabel_format(useOffset=False)
    ax.xaxis.set_major_locator(MaxNLocator(4))


def history(df: pd.DataFrame, caption: str = "") -> Figure:
    """Held-out loss of pretraining with its learning rate, and of the finetuning runs after it."""
    df = df.dropna(subset=["held_out_loss"])
    figure, axes = _subplots(1, 2, (10, 4.2))
    left, right = axes.flat
    baseline, finetuned = df[df["run"] == "baseline"], df[df["run"] != "baseline"]
    left.set(title="pretraining", xlabel="step", ylabel="held-out loss")
    right.set(title="finetuning from the pretrained model", xlabel="step")
    if baseline.empty:
        _empty(left, "no history: the pretrained model was loaded")
    else:
        left.plot(baseline["step"], baseline["held_out_loss"], "o-", color=_C[0], ms=4)
        left.set_yscale("log" if baseline["held_out_loss"].min() > 0 else "linear")
        rate = left.twinx()
        rate.plot(baseline["step"], baseline["learning_rate"], "--", color=_C[1])
        rate.set_ylabel("learning rate (dashed)", color=_C[1])
        rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        rate.set_ylim(bottom=0)
        last = baseline["held_out_loss"].iloc[-1]
        right.axhline(last, color=STYLES["pretrained"][0], lw=1, label="end of pretraining")
    if finetuned.empty:
        _empty(right, "no finetuning run")
        return _captioned(figure, caption)
    for run, part in finetuned.groupby("run", sort=False):
        right.plot(part["step"], part["held_out_loss"], ms=4, label=run, **_run_style(run))
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return _captioned(figure, caption)


def neighbours(df: pd.DataFrame, caption: str = "") -> Figure:
    """Distance to the nearest training image, per arm, against held-out images' own."""
    test, arms = df[df["arm"] == "test"], df[df["arm"] != "test"]
    figure, axes = _subplots(1, 1, (9, 1.8 + 0.32 * len(arms)))
    ax = axes.flat[0]
    for _, row in test.iterrows():
        ax.axvspan(row["q05"], row["q95"], color="0.94", zorder=0, label="test images, 5–95 %")
        ax.axvspan(row["q25"], row["q75"], color="0.86", zorder=0, label="test images, quartiles")
        ax.axvline(row["median"], color="0.4", ls="--", label="test images, median")
    for y, (_, row) in enumerate(arms.iterrows()):
        colour, marker, _ = STYLES.get(row["arm"], _unknown(y))
        ax.plot([row["q05"], row["q95"]], [y, y], color=colour, lw=1.2)
        ax.plot([row["q25"], row["q75"]], [y, y], color=colour, lw=5, solid_capstyle="butt")
        ax.plot(row["median"], y, marker, color=colour, mec="black", ms=9)
    ax.set_yticks(range(len(arms)), [_title(arm) for arm in arms["arm"]])
    ax.invert_yaxis()
    ax.set_xlabel("Euclidean distance to the nearest training image, pixels in [−1, 1]")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    note = "Symbol: median, thick: quartiles, thin: 5–95 %. Copies would lie left of the test band"
    sizes = " or ".join(f"{n:,}" for n in sorted(arms["n"].unique()))
    return _captioned(figure, f"{note}. n = {sizes} images per arm. {caption}")


def _subplots(rows: int, columns: int, inches: tuple, **options) -> tuple[Figure, np.ndarray]:
    sns.set_theme(style="ticks", context="notebook", font_scale=0.95)
    return plt.subplots(
        rows, columns, figsize=inches, squeeze=False, layout="constrained", **options
    )


def _captioned(figure: Figure, caption: str) -> Figure:
    text = textwrap.fill(caption.removeprefix(". "), int(13.5 * figure.get_figwidth()))
    figure.supxlabel(text, fontsize=9.5, color="0.3", x=0.01, ha="left")
    return figure


def _by_ablation(arms: list[str]) -> dict[str, list[str]]:
    """Panel title -> arms; an arm that is of no ablation is in every panel."""
    panels = {
        f"Ablation {n}: {what}": [a for a in arms if a not in ARMS or n in ARMS[a].ablations]
        for n, what in tables.ABLATIONS.items()
    }
    one, two = panels.values()
    if set(one) <= set(two) or set(two) <= set(one):
        return {"": list(arms)}
    return panels


def _title(arm: str) -> str:
    return ARMS[arm].title if arm in ARMS else arm


def _unknown(i: int) -> tuple[tuple, str, str]:
    return sns.color_palette("colorblind")[i % 10], "os^vD"[i % 5], "-"


def _run_style(run: str) -> dict:
    """The colour of the arm a run serves; markers and lines tell its siblings apart."""
    arms = {"expert": "routed", "all-plain": "all_plain", "all-same": "all_same", "soup": "soup"}
    colour = next((STYLES[arm][0] for name, arm in arms.items() if run.startswith(name)), _C[7])
    number = re.search(r"\d+", run)
    i = int(number[0]) - 1 if number else 0
    return {"color": colour, "marker": "os^vDPX*"[i % 8], "ls": ("-", "--", ":", "-.")[i % 4]}


def _shared_legend(axes: np.ndarray) -> tuple[list, list]:
    found = {}
    for ax in axes.flat:
        handles, labels = ax.get_legend_handles_labels()
        found.update(zip(labels, handles, strict=True))
    return list(found.values()), list(found)


def _symlog_if_wide(ax: plt.Axes, records: tables.Records) -> None:
    """A symmetric logarithmic axis where one arm would squeeze all others to a point."""
    means = records.metrics.groupby("arm")["fid"].mean()
    sizes = (means - means["pretrained"]).abs().drop("pretrained")
    if sizes.max() > 15 * sizes.median() > 0:
        low, high = ax.get_xlim()
        ax.set_xscale("symlog", linthresh=2 * sizes.median())
        ax.set_xlim(2 * low if low < -sizes.median() else low, 2 * high)


def _label(ax: plt.Axes, x: float, y: float, text: str, above: int = 8) -> None:
    """Text beside a point, on the side where there is room."""
    side = -1 if x > sum(ax.get_xlim()) / 2 else 1
    style = {"bbox": {"fc": "white", "alpha": 0.8, "ec": "none", "pad": 1}}
    style |= {"ha": "left" if side == 1 else "right", "textcoords": "offset points"}
    ax.annotate(text, (x, y), xytext=(8 * side, above), **style)


def _empty(ax: plt.Axes, text: str) -> None:
    ax.text(0.5, 0.5, text, ha="center", va="center", transform=ax.transAxes, color="0.4")
    ax.set(xticks=[], yticks=[])
