"""The method as a diagram."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from deme_lib.report.plots.style import GREY, STYLES, shades, subplots

LEFT, RIGHT = 15, 61
"""Of the N columns, in tenths of an inch."""
SHIRT = ("11000011", "11111111", "11111111", "00111100", "00111100", "00111100", "00111100")
MERGED = "$\\mathbf{merged\\ model}$   $\\theta+\\Sigma_i\\,w_i\\,\\tau_i$"
ROUTED = "$\\mathbf{routed\\ ensemble}$\nat t, the expert of\nt's range predicts"
AVERAGED = "$\\mathbf{averaged\\ ensemble}$\nat any t, the mean of\nN predictions"


def method(n_ranges: int = 4) -> Figure:
    """The pretrained model, N experts on ranges of timesteps, their merge, and two ensembles."""
    figure, axes = subplots(1, 1, 4.9, layout=None)
    ax = axes[0, 0]
    ax.set_position([0, 0, 1, 1])
    edges = np.linspace(LEFT, RIGHT, n_ranges + 1)
    few = n_ranges <= 5  # room for words
    _pictures(ax, n_ranges * -(-12 // n_ranges))
    ax.text(1.5, 44, "an image at\ntimestep t", fontsize=10.5, va="center", linespacing=1.4)
    _box(ax, (1.5, 12.5), (25, 32), "pretrained\nmodel $\\theta$", GREY)
    _box(ax, (LEFT - 0.5, RIGHT + 0.5), (24, 33), "", "0.65", fc="none", ls="--")
    _line(ax, (7, 32), (7, 35.5), ((edges[-2] + edges[-1]) / 2, 35.5))
    ax.text(7.5, 36.1, "copy and finetune", fontsize=10)
    _line(ax, (7, 25), (7, 11), head=True)
    for k, colour in enumerate(shades(n_ranges)):
        x, sides = edges[k : k + 2].mean(), edges[k : k + 2] + np.array([0.6, -0.6])
        i, words = f"_{{{k + 1}}}", ("range ", "expert ") if few else ("", "")
        ax.plot(sides, [41, 41], color=colour, lw=5, solid_capstyle="butt")
        ax.text(x, 38.6, f"{words[0]}{k + 1}", fontsize=10.5, ha="center", va="center")
        for start, stop in ((35.5, 32), (25, 21), (16.5, 11)):
            _line(ax, (x, start), (x, stop), head=True)
        finetuned = f"{words[1]}$\\theta{i}$" + (f"\non range {k + 1}" if few else "")
        _box(ax, sides, (25, 32), finetuned, colour)
        difference = f"$=\\theta{i}-\\theta$" if few else ""
        _box(ax, sides, (16.5, 21), f"$\\tau{i}${difference}", colour)
        ax.text(x + 0.7, 14, f"$\\times\\,w{i}$", fontsize=11, va="center")
    _box(
        ax, (1.5, RIGHT), (3, 11), f"{MERGED}\n1 model held, 1 call a step", "deme_merged", size=12
    )
    ax.text(66, 35.5, "instead of merging", fontsize=11, weight="bold")
    _line(ax, (RIGHT + 0.5, 28.5), (66, 28.5), head=True)
    _line(ax, (63.8, 28.5), (63.8, 10), (66, 10), head=True)
    _box(ax, (66, 88.5), (21, 33.5), f"{ROUTED}\nN models held,\n1 call a step", "deme_routed")
    _box(ax, (66, 88.5), (3, 17.5), f"{AVERAGED}\nN models held,\nN calls a step", "averaged")
    ax.set(xlim=(0, 90), ylim=(0, 49), aspect="auto")
    ax.axis("off")
    return figure


def _pictures(ax: plt.Axes, count: int) -> None:
    """One picture at so many timesteps, noise growing to the right."""
    shirt = np.pad([[int(c) for c in line] for line in SHIRT], 1)  # [9, 10]
    noise = np.random.default_rng(0).normal(0.5, 0.35, (count, *shirt.shape))
    side = (RIGHT - LEFT) / count
    for k, share in enumerate(np.cos(np.linspace(0, np.pi / 2, count)) ** 2):
        x, picture = LEFT + k * side, share * shirt + (1 - share) * noise[k]
        place = (x + 0.2, x + side - 0.2, 42.2, 42.2 + side - 0.4)
        ax.imshow(picture, cmap="gray", vmin=0, vmax=1, extent=place, interpolation="nearest")


def _box(
    ax: plt.Axes, x: tuple, y: tuple, text: str, colour: str, size: float = 10.5, **look
) -> None:
    """A rounded box from x to x and y to y, in a colour or an arm's."""
    colour = STYLES[colour][0] if colour in STYLES else colour
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
