"""One look for every figure: a colour, marker and line style per arm, captions, legends."""

from __future__ import annotations

import textwrap

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure

from deme_lib.experiment.arms import ARMS
from deme_lib.report import tables

LEGEND = {"ncols": 2, "frameon": False, "fontsize": 9, "columnspacing": 1, "handlelength": 2.6}


COLOURS = sns.color_palette("colorblind").as_hex()


STYLES = {
    "pretrained": ("#6e6e6e", "o", "-"),
    "all_plain": (COLOURS[1], "s", "--"),
    "reweighted": ("black", "H", "--"),
    "all_same": (COLOURS[3], "D", "--"),
    "all_scaled": (COLOURS[5], "d", "--"),
    "soup_uniform": (COLOURS[6], "<", ":"),
    "soup": (COLOURS[4], "v", ":"),
    "routed": (COLOURS[2], "^", "-"),
    "merged_uniform": (COLOURS[9], "h", "-"),
    "merged": (COLOURS[0], "*", "-"),
    "averaged": (COLOURS[3], "P", "-."),
    "output_merge": (COLOURS[1], "X", "-."),
    "one_scaled": (COLOURS[4], ">", (0, (1, 3))),
    "best_single": (COLOURS[5], "p", (0, (1, 3))),
}
"""Arm -> (colour, marker, line style); a colour repeats only between the two ablations."""


def subplots(rows: int, columns: int, inches: tuple, **options) -> tuple[Figure, np.ndarray]:
    sns.set_theme(style="ticks", context="notebook", font_scale=0.95)
    return plt.subplots(
        rows, columns, figsize=inches, squeeze=False, layout="constrained", **options
    )


def captioned(figure: Figure, caption: str) -> Figure:
    text = textwrap.fill(caption.removeprefix(". "), int(13.5 * figure.get_figwidth()))
    figure.supxlabel(text, fontsize=9.5, color="0.3", x=0.01, ha="left")
    return figure


def by_ablation(arms: list[str]) -> dict[str, list[str]]:
    """Panel title -> arms; an arm that is of no ablation is in every panel."""
    panels = {
        f"Ablation {n}: {what}": [a for a in arms if a not in ARMS or n in ARMS[a].ablations]
        for n, what in tables.ABLATIONS.items()
    }
    one, two = panels.values()
    if set(one) <= set(two) or set(two) <= set(one):
        return {"": list(arms)}
    return panels


def title_of(arm: str) -> str:
    return ARMS[arm].title if arm in ARMS else arm


def unknown_style(i: int) -> tuple[tuple, str, str]:
    return sns.color_palette("colorblind")[i % 10], "os^vD"[i % 5], "-"


def shared_legend(axes: np.ndarray) -> tuple[list, list]:
    found = {}
    for ax in axes.flat:
        handles, labels = ax.get_legend_handles_labels()
        found.update(zip(labels, handles, strict=True))
    return list(found.values()), list(found)


def label(ax: plt.Axes, x: float, y: float, text: str, above: int = 8) -> None:
    """Text beside a point, on the side where there is room."""
    side = -1 if x > sum(ax.get_xlim()) / 2 else 1
    style = {"bbox": {"fc": "white", "alpha": 0.8, "ec": "none", "pad": 1}}
    style |= {"ha": "left" if side == 1 else "right", "textcoords": "offset points"}
    ax.annotate(text, (x, y), xytext=(8 * side, above), **style)


def empty(ax: plt.Axes, text: str) -> None:
    ax.text(0.5, 0.5, text, ha="center", va="center", transform=ax.transAxes, color="0.4")
    ax.set(xticks=[], yticks=[])
