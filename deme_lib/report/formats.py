"""Files of tables and figures: the same content gives the same bytes."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure


def markdown(table: pd.DataFrame) -> str:
    """A table of strings in GitHub's markdown; the first column to the left."""
    rules = [":--", *["--:"] * (table.shape[1] - 1)]
    lines = [list(table.columns), rules, *table.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def latex(table: pd.DataFrame, caption: str, label: str) -> str:
    """A table of strings as a LaTeX table (needs booktabs)."""
    lines = [" & ".join(map(_tex, line)) + r" \\" for line in table.to_numpy().tolist()]
    head = " & ".join(map(_tex, table.columns)) + r" \\"
    body = "\n".join([r"\toprule", head, r"\midrule", *lines, r"\bottomrule"])
    return (
        f"\\begin{{table}}\n\\caption{{{_tex(caption)}}}\n\\label{{tab:{label}}}\n"
        f"\\begin{{tabular}}{{l{'r' * (table.shape[1] - 1)}}}\n{body}\n"
        "\\end{tabular}\n\\end{table}"
    )


def write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def save(figure: Figure, path: Path) -> None:
    """Write a PNG without date or version, and close the figure."""
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)


def _tex(text: str) -> str:
    text = re.sub(r"([%&_#$])", r"\\\1", text)
    signs = {"±": r"$\pm$", "×": r"$\times$", "−": "$-$", "–": "--", "↓": r"$\downarrow$"}
    for sign, command in {**signs, "↑": r"$\uparrow$"}.items():
        text = text.replace(sign, command)
    return text
