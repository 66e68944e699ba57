"""One look for every figure: a colour and marker per arm, one caption, one legend."""

import textwrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import SymmetricalLogLocator

from deme_lib.report.records import QUANTILES

COLOURS = sns.color_palette("colorblind").as_hex()
GREY = "#6e6e6e"
WHITE = {"fc": "white", "alpha": 0.75, "ec": "none", "pad": 1.5}
WIDTH = 9
"""Inches of every figure: at the README's 830 pixels, 10 points are 13 pixels high."""

STYLES = {
    "pretrained": (GREY, "o"),
    "all_plain": (COLOURS[1], "s"),
    "balanced": (COLOURS[8], "h"),
    "soup": (COLOURS[4], "v"),
    "plain_routed": (COLOURS[2], "^"),
    "last_expert": (COLOURS[5], ">"),
    "deme_routed": (COLOURS[9], "D"),
    "deme_merged": (COLOURS[0], "*"),
    "averaged": (COLOURS[3], "P"),
    "plain_merged": (COLOURS[2], "X"),
    "reweighted": (COLOURS[7], "H"),
    "all_same": (COLOURS[3], "d"),
    "soup_same": (COLOURS[6], "p"),
    "distilled": (COLOURS[4], "<"),
}
"""Arm -> (colour, marker); an arm of one's own is black."""
SIZES = {"*": 12, "P": 9, "D": 7}

PLAIN = {"axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8}
PLAIN |= {"axes.edgecolor": "0.4", "axes.formatter.useoffset": False}
sns.set_theme(style="ticks", context="notebook", font_scale=0.88, rc=PLAIN)


def of(row: str) -> dict:
    """Colour and marker of a row's arm, in any cell ("cell / arm")."""
    colour, marker = STYLES.get(row.split(" / ")[-1], ("black", "8"))
    return {"color": colour, "marker": marker, "ms": SIZES.get(marker, 8)}


def shades(n: int) -> list:
    """A colour per range, from t = 0 up."""
    return sns.color_palette("viridis", n + 2)[1:-1]


def subplots(rows: int, columns: int, height: float, **options) -> tuple[Figure, np.ndarray]:
    """A figure of the README's width and its axes [rows, columns]."""
    options = {"layout": "constrained", "squeeze": False, **options}
    figure, axes = plt.subplots(rows, columns, figsize=(WIDTH, height), **options)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    return figure, axes


def captioned(figure: Figure, caption: str) -> Figure:
    """A small text under the figure, in lines of its width."""
    look = {"fontsize": 9, "color": "0.35", "linespacing": 1.3}
    figure.supxlabel(textwrap.fill(caption, 120), x=0.012, ha="left", **look)
    return figure


def legend(figure: Figure, columns: int) -> None:
    """One legend above the figure for whatever its axes label, instead of their own."""
    found = {}
    for ax in figure.axes:
        if ax.get_legend():
            ax.get_legend().remove()
        found |= dict(zip(*ax.get_legend_handles_labels()[::-1], strict=True))
    look = {"loc": "outside upper center", "frameon": False, "fontsize": 10}
    figure.legend(found.values(), found.keys(), ncols=columns, **look)


def boxes(df: pd.DataFrame, **options) -> None:
    """A box per row, from its recorded quantiles: quartiles, whiskers from 5 to 95 %."""
    names = [c for c in df if c not in QUANTILES]
    look = {"whis": (0, 100), "showfliers": False, "linewidth": 0.8, "saturation": 1}
    sns.boxplot(df.melt(names, QUANTILES), **look, **options)


def symlog(axis: Axis, linear: float, ticks: tuple[int, ...] = (1, 3)) -> None:
    """A symmetric logarithmic axis, linear up to ``linear``, with ticks per power of ten."""
    getattr(axis.axes, f"set_{axis.axis_name}scale")("symlog", linthresh=linear, linscale=0.7)
    axis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=linear, subs=ticks))
    axis.set_major_formatter("{x:g}")
