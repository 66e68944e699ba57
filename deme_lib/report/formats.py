"""Numbers as printed, and files that are the same bytes for the same content."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

UNKNOWN = "–"


def decimals(x: float, places: int = 3) -> str:
    """So many decimals and a true minus sign; a dash where nothing is known."""
    return UNKNOWN if pd.isna(x) else f"{x:,.{places}f}".replace("-", "−")


def plus_minus(mean: float, half: float) -> str:
    """Signed ``mean ± half`` with the first two digits of ``half``; without it where unknown."""
    if pd.isna(mean):
        return UNKNOWN
    places = int(np.clip(1 - np.floor(np.log10(half)), 0, 8)) if half > 0 else 3
    signed = f"{'+' if mean > 0 else ''}{decimals(mean, places)}"
    return signed if pd.isna(half) else f"{signed} ± {decimals(half, places)}"


def markdown(table: pd.DataFrame) -> str:
    """A table of strings in GitHub's markdown; the first column to the left."""
    rules = [":--", *["--:"] * (table.shape[1] - 1)]
    lines = [list(table.columns), rules, *table.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def write_csv(path: Path, table: pd.DataFrame) -> None:
    write(path, table.to_csv(index=False, float_format="%.6g", lineterminator="\n"))


def save(figure: Figure, path: Path) -> None:
    """Write a PNG without date or version, and close the figure."""
    figure.savefig(path, dpi=150, facecolor="white", metadata={"Software": None})
    plt.close(figure)
