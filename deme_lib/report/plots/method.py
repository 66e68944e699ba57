"""The method as a diagram."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from deme_lib.report.plots.style import GREY, STYLES, WIDTH, shades

LEFT, RIGHT = 15, 61
"""Of the N columns, in tenths of an inch."""
SHIRT = ("11000011", "11111111", "11111111", "00111100", "00111100", "00111100", "00111100")
MERGED = """$\\mathbf{merged\\ model}$   $\\theta+\\Sigma_i\\,w_i\\,\\tau_i$
1 model held, 1 call a step"""
ROUTED = """$\\mathbf{routed\\ ensemble}$
at t, the expert of
t's range predicts
N models held,
1 call a step"""
AVERAGED = """$\\mathbf{averaged\\ ensemble}$
at any t, the mean of
N predictions
N models held,
N calls a step"""


def method(n_ranges: int = 4) -> Figure:
    """The pretrained model, N experts on ranges of timesteps, their merge, and two ensembles."""
    figure = plt.figure(figsize=(WIDTH, 4.9))
    ax = figure.add_axes([0, 0, 1, 1], xlim=(0, 90), ylim=(0, 49))
    ax.axis("off")
    edges = np.linspace(LEFT, RIGHT, n_ranges + 1)
    _pictures(ax, n_ranges * -(-12 // n_ranges))
    ax.text(1.5, 44, "an image at\ntimestep t", fontsize=10.5, va="center", linespacing=1.4)
    _box(ax, (1.5, 12.5), (25, 32), "pretrained\nmodel $\\theta$", GREY)
    _box(ax, (LEFT - 0.5, RIGHT + 0.5), (24, 33), "", "0.65", fc="none", ls="--")
    _line(ax, (7, 32), (7, 35.5), (edges[-2:].mean(), 35.5))
    ax.text(7.5, 36.1, "copy and finetune", fontsize=10)
    _line(ax, (7, 25), (7, 11), head=True)
    for k, colour in enumerate(shades(n_ranges), 1):
        sides = edges[k - 1] + 0.6, edges[k] - 0.6
        x, i = sum(sides) / 2, f"_{{{k}}}"
        name, expert, vector = str(k), f"$\\theta{i}$", f"$\\tau{i}$"
        if n_ranges <= 5:  # room for words
            name, expert = f"range {k}", f"expert {expert}\non range {k}"
            vector = f"{vector}$=\\theta{i}-\\theta$"
        ax.plot(sides, [41, 41], color=colour, lw=5, solid_capstyle="butt")
        ax.text(x, 38.6, name, fontsize=10.5, ha="center", va="center")
        for start, stop in ((35.5, 32), (25, 21), (16.5, 11)):
            _line(ax, (x, start), (x, stop), head=True)
        _box(ax, sides, (25, 32), expert, colour)
        _box(ax, sides, (16.5, 21), vector, colour)
        ax.text(x + 0.7, 14, f"$\\times\\,w{i}$", fontsize=11, va="center")
    _box(ax, (1.5, RIGHT), (3, 11), MERGED, STYLES["deme_merged"][0], size=12)
    ax.text(66, 35.5, "instead of merging", fontsize=11, weight="bold")
    _line(ax, (RIGHT + 0.5, 28.5), (66, 28.5), head=True)
    _line(ax, (63.8, 28.5), (63.8, 10), (66, 10), head=True)
    _box(ax, (66, 88.5), (21, 33.5), ROUTED, STYLES["deme_routed"][0])
    _box(ax, (66, 88.5), (3, 17.5), AVERAGED, STYLES["averaged"][0])
    return figure


def _pictures(ax: plt.Axes, count: int) -> None:
    """One picture at so many timesteps, noise growing to the right."""
    shirt = np.pad([[int(c) for c in line] for line in SHIRT], 1)  # [9, 10]
    noise = np.random.default_rng(0).normal(0.5, 0.35, (count, *shirt.shape))
    side = (RIGHT - LEFT) / count
    for k, share in enumerate(np.cos(np.linspace(0, np.pi / 2, count)) ** 2):
        x, picture = LEFT + k * side, share * shirt + (1 - share) * noise[k]
        place = (x + 0.2, x + side - 0.2, 42.2, 42.2 + side - 0.4)
        look = {"cmap": "gray", "vmin": 0, "vmax": 1, "interpolation": "nearest"}
        ax.imshow(picture, extent=place, aspect="auto", **look)


def _box(
    ax: plt.Axes, x: tuple, y: tuple, text: str, colour: str, size: float = 10.5, **look
) -> None:
    """A rounded box from x to x and y to y."""
    look = {"fc": 1 - 0.2 * (1 - np.array(to_rgb(colour))), "ec": colour, "lw": 1.5, **look}
    style = "round,pad=0,rounding_size=1"
    ax.add_patch(FancyBboxPatch((x[0], y[0]), x[1] - x[0], y[1] - y[0], boxstyle=style, **look))
    where = {"ha": "center", "va": "center", "linespacing": 1.4}
    ax.text(sum(x) / 2, sum(y) / 2, text, fontsize=size, **where)


def _line(ax: plt.Axes, *points: tuple[float, float], head: bool = False) -> None:
    """A line through points, with an arrow's head at its end."""
    ax.plot(*zip(*points, strict=True), color="0.35", lw=1.3, zorder=0)
    if head:
        look = {"arrowstyle": "-|>", "color": "0.35", "shrinkA": 0, "shrinkB": 0}
        ax.annotate("", points[-1], points[-2], arrowprops=look)
