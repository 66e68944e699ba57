"""Numbers as printed, and files that are the same bytes for the same content."""

import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

UNKNOWN = "–"


def decimals(x: float, places: int = 3) -> str:
    """So many decimals and a true minus sign; a dash where nothing is known."""
    return UNKNOWN if pd.isna(x) else f"{x:,.{places}f}".replace("-", "−")


def number(x: float) -> str:
    """Three significant digits."""
    places = 2 - np.floor(np.log10(abs(x))) if x and np.isfinite(x) else 3
    return decimals(x, int(np.clip(places, 0, 9)))


def percent(x: float) -> str:
    return UNKNOWN if pd.isna(x) else f"{decimals(100 * x, 1)} %"


def plus_minus(mean: float, spread: float) -> str:
    """Signed ``mean ± spread`` with the spread's first two digits; without it where unknown."""
    if pd.isna(mean):
        return UNKNOWN
    places = _places(spread)
    signed = f"{'+' if mean > 0 else ''}{decimals(mean, places)}"
    return signed if pd.isna(spread) else f"{signed} ± {decimals(spread, places)}"


def _places(spread: float) -> int:
    """Decimals that show a spread's first two digits."""
    return int(np.clip(1 - np.floor(np.log10(spread)), 0, 8)) if spread > 0 else 3


def interval(effect: float, low: float, high: float) -> str:
    """``effect [low, high]`` with two digits of the half-width, more where an end would seem 0."""
    if pd.isna(low):
        return number(effect)
    places = _places((high - low) / 2)
    while low * high > 0 and places < 8 and not round(min(abs(low), abs(high)), places):
        places += 1
    low, high = decimals(low, places), decimals(high, places)
    return f"{decimals(effect, places)} [{low}, {high}]"


def markdown(table: pd.DataFrame) -> str:
    """A table of strings in GitHub's markdown; the first column to the left."""
    rules = [":--", *["--:"] * (table.shape[1] - 1)]
    lines = [list(table.columns), rules, *table.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def latex(table: pd.DataFrame, caption: str, name: str) -> str:
    """A table of strings as a LaTeX table (needs booktabs)."""
    columns = {"column_format": "l" + "r" * (table.shape[1] - 1), "hrules": True}
    shown = table.map(_tex).rename(columns=_tex).style.hide()
    return shown.to_latex(caption=_tex(caption), label=f"tab:{name}", **columns)


def write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def write_csv(path: Path, table: pd.DataFrame) -> None:
    write(path, table.to_csv(index=False, float_format="%.6g", lineterminator="\n"))


def save(figure: Figure, path: Path) -> None:
    """Write a PNG without date or version, and close the figure."""
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)


def _tex(text: str) -> str:
    text = re.sub(r"([%&_#$])", r"\\\1", text)
    signs = {"±": r"$\pm$", "×": r"$\times$", "−": "$-$", "–": "--"}
    signs |= {"↓": r"$\downarrow$", "↑": r"$\uparrow$"}
    return text.translate(str.maketrans(signs))
