"""Generated numbers in sentences that people write, and generated tables beneath them.

In any Markdown file, with the folder of ``figures/`` that a value is from:

    <!--n EXPERIMENT: a - b | measure | column-->…<!--/n-->      a row of comparisons.csv
    <!--n EXPERIMENT: arm | column-->…<!--/n-->                  a row of table.csv
    <!--n EXPERIMENT: gate model RANGE | column-->…<!--/n-->     a row of gate.csv
    <!--n .: benchmarks what / against | ratio-->…<!--/n-->      a row of benchmarks.csv
    <!--table EXPERIMENT/NAME.md-->…<!--/table-->                a whole file

``interval`` joins ``low`` and ``high``, ``share_interval`` and ``difference_interval`` theirs;
``claim`` is a comparison's share with its interval and verdict.
"""

import re
from pathlib import Path

import pandas as pd

from deme_lib.report.formats import decimals, number, percent

NUMBER = re.compile(r"<!--n (?P<experiment>[^:>]+): (?P<path>.+?)-->(.*?)<!--/n-->", re.DOTALL)
TABLE = re.compile(r"<!--table (?P<path>\S+?)-->(.*?)<!--/table-->", re.DOTALL)
PERCENT = {"relative", "share", "share_low", "share_high", "level"}
NAMES = {
    "comparisons": "{a} - {b} | {measure}".format_map,
    "gate": "gate {model} {range}".format_map,
    "benchmarks": "benchmarks {what} / {against}".format_map,
    "table": "{arm}".format_map,
}
"""File -> how a marker names a row of it."""


def fill(text: str, figures: Path) -> str:
    """The text with everything between markers as the files under ``figures`` have it.

    Raises:
        ValueError: a marker names a file, row or column that is not there, or is not closed.
    """
    for kind in ("n", "table"):
        if text.count(f"<!--{kind} ") != text.count(f"<!--/{kind}-->"):
            raise ValueError(f"a marker <!--{kind} ...--> has no <!--/{kind}-->, or it no opening")
    figures = Path(figures)
    text = TABLE.sub(lambda found: _table(found, figures), text)
    return NUMBER.sub(lambda found: _number(found, figures), text)


def _table(found: re.Match, figures: Path) -> str:
    path = figures / found["path"]
    if not path.is_file():
        raise ValueError(f"{found[0].splitlines()[0]}: no file {path}")
    return f"<!--table {found['path']}-->\n{path.read_text().strip()}\n<!--/table-->"


def _number(found: re.Match, figures: Path) -> str:
    experiment, path = found["experiment"], found["path"].strip()
    try:
        value = lookup(figures / experiment, path)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"<!--n {experiment}: {path}-->: {error}") from None
    return f"<!--n {experiment}: {path}-->{value}<!--/n-->"


def lookup(folder: Path, path: str) -> str:
    """A value of a folder of figures, as printed."""
    *row, column = (part.strip() for part in path.split("|"))
    row = " | ".join(row)
    kind = row.split(" ")[0]
    file = "comparisons" if "|" in row else kind if kind in NAMES else "table"
    values = pd.read_csv(folder / f"{file}.csv", keep_default_na=False, na_values=[""])
    names = [NAMES[file](known) for known in values.to_dict("records")]
    if names.count(row) != 1:
        raise ValueError(f"no row {row!r}, there are: {'; '.join(names)}")
    return shown(values.iloc[names.index(row)], column)


def shown(row: pd.Series, column: str) -> str:
    """A value by fixed rules: percent for shares, three digits, whole numbers with commas."""
    if column.endswith("interval"):
        start = column.removesuffix("interval")
        return f"[{shown(row, f'{start}low')}, {shown(row, f'{start}high')}]"
    if column == "claim":
        share, inside = (shown(row, name) for name in ("share", "share_interval"))
        return f"{share} {inside} (*{shown(row, 'verdict')}*)"
    if column not in row:
        raise ValueError(f"no column {column!r}, there are: {', '.join(map(str, row.index))}")
    value = row[column]
    if isinstance(value, str):
        return value
    if column in PERCENT or (column in ("low", "high") and "model" in row):  # of gate.csv
        return percent(value)
    return decimals(value, 0) if float(value).is_integer() else number(value)
