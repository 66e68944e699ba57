"""Sweeps to tables and figures: cells that differ in a few parameters, beside arms of their base.

Within a sweep the noise is the same everywhere, so every row is compared with the base's
pretrained model in pairs of sampling seeds.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from deme_lib.experiment.arms import ARMS, BASE
from deme_lib.report import comparisons, plots, tables
from deme_lib.report.formats import latex, markdown, save, write

COLUMNS = "cell arm training_seed seed n features steps fid"
TABLE = (
    "cell arm title fid_mean fid_sd difference difference_halfwidth merging merging_halfwidth "
    "training_steps weights paper"
)
NO_MERGE = "Where weights are all 0 the search chose no merge: such a row is the pretrained model. "
NOT_COMPARABLE = "the paper's FID (CIFAR10, Inception: not comparable)"


@dataclass(frozen=True)
class Sweep:
    """Records of a sweep: ``metrics`` as in ``<name>.csv``, all else as in ``<name>.json``."""

    name: str
    metrics: pd.DataFrame
    document: dict

    @property
    def parameters(self) -> dict:
        """The parameters of the base."""
        return self.document["parameters"]

    @property
    def rows(self) -> list[tuple[str, str]]:
        """(cell, arm): arms of the base, then those of every cell."""
        return [(BASE, arm) for arm in self.document["beside"]] + self.cell_rows

    @property
    def cell_rows(self) -> list[tuple[str, str]]:
        """(cell, arm) without those of the base."""
        return [(cell, arm) for cell in self.cells for arm in self.document["arms"]]

    @property
    def cells(self) -> dict[str, dict]:
        """What was recorded of every cell, by its name."""
        return {cell["cell"]: cell for cell in self.document["cells"]}

    @property
    def titles(self) -> dict[str, str]:
        """Arm -> title as printed."""
        return {**self.document["beside"], **self.document["arms"]}

    def fid(self, cell: str, arm: str) -> np.ndarray:
        """[S] FID by ascending sampling seed."""
        m = self.metrics
        return m[(m["cell"] == cell) & (m["arm"] == arm)].sort_values("seed")["fid"].to_numpy()

    def compare(
        self, a: tuple[str, str], b: tuple[str, str], level: float | None = None
    ) -> tuple[float, float]:
        """Mean of FID of row ``a`` minus row ``b``, and its paired t interval's half-width."""
        difference = self.fid(*a) - self.fid(*b)
        return comparisons.paired_interval(difference, level or self.parameters["confidence"])

    @property
    def changes(self) -> list[tuple[tuple[str, str], tuple[str, str]]]:
        """Pairs of a cell's row and a row that it is compared with."""
        cells, every, pairs = self.cells, self.document["against"], {}
        for row in self.cell_rows:
            names = (*every, *cells[row[0]].get("against", []))
            others = [self._named(name, row[1]) for name in names]
            pairs |= {(row, other): None for other in others if other != row}
        return list(pairs)

    def _named(self, name: str, arm: str) -> tuple[str, str]:
        """The row that ``against`` names, for an arm."""
        if name in self.document["beside"]:
            return BASE, name
        cell, _, other = name.partition(" / ")
        return cell, other or arm

    def label(self, row: tuple[str, str], arm: str = "") -> str:
        """A row as printed; without its arm where that is ``arm``."""
        cell, other = row
        if cell == BASE:
            return self.titles[other]
        return cell if other == arm else f"{cell} ({self.titles[other]})"


def read(folder: Path, name: str) -> Sweep:
    """Read ``sweeps/<name>.csv`` and ``.json`` of a folder of records.

    Raises:
        ValueError: a column or a row is missing, or rows cannot be compared.
    """
    path = Path(folder) / "sweeps" / f"{name}.csv"
    metrics = pd.read_csv(path, dtype={"cell": str}, keep_default_na=False, na_values=[""])
    if missing := [c for c in COLUMNS.split() if c not in metrics]:
        raise ValueError(f"{path} lacks the columns {missing}")
    for column in ("n", "features", "steps", "training_seed"):
        if metrics[column].nunique() != 1:
            found = metrics[column].unique().tolist()
            raise ValueError(f"{path} mixes {column} {found}: such rows are not comparable")
    sweep = Sweep(name, metrics, json.loads(path.with_suffix(".json").read_text()))
    seeds = sorted(metrics["seed"].unique())
    found = {key: sorted(rows["seed"]) for key, rows in metrics.groupby(["cell", "arm"])}
    for row in [(BASE, "pretrained"), *sweep.rows]:
        if found.get(row) != seeds:
            raise ValueError(f"{path}: {row} needs exactly one row per sampling seed {seeds}")
    return sweep


def table(sweep: Sweep) -> pd.DataFrame:
    """A row per cell and arm, plain numbers: FID, and its paired differences.

    ``difference`` is to the base's pretrained model, ``merging`` that of merged to routed.
    """
    p, cells, titles, rows = sweep.parameters, sweep.cells, sweep.titles, []
    for cell, arm in sweep.rows:
        fid = sweep.fid(cell, arm)
        row = {"cell": cell, "arm": arm, "title": titles[arm]}
        row |= {"fid_mean": fid.mean(), "fid_sd": fid.std(ddof=1)}
        if (cell, arm) != (BASE, "pretrained"):
            found = sweep.compare((cell, arm), (BASE, "pretrained"))
            row |= dict(zip(("difference", "difference_halfwidth"), found, strict=True))
        if arm == "merged" and (cell, "routed") in sweep.rows:
            found = sweep.compare((cell, arm), (cell, "routed"))
            row |= dict(zip(("merging", "merging_halfwidth"), found, strict=True))
        trained = 0 if ARMS[arm].members == "none" else p["n_ranges"] * p["finetune_steps"]
        known = cells.get(cell, {"training_steps": trained, "results": {}})
        row |= {"weights": _weights(known["results"].get(arm, {}))}
        rows.append(row | {"training_steps": known["training_steps"], "paper": known.get("paper")})
    return pd.DataFrame(rows, columns=TABLE.split()).astype({"paper": float})


def _weights(result: dict) -> str:
    """Searched weights of a merge; those of re-weighted tasks; else a dash."""
    for tasks in result.get("task_weights", []):
        return "tasks " + ", ".join(f"{w:.2g}" for w in tasks)
    if not result.get("search_losses"):
        return "–"
    weights = result["weights"]
    return ", ".join(f"{w:g}" for w in weights) if any(weights) else "all 0: no merge"


def differences(sweep: Sweep) -> pd.DataFrame:
    """A row per comparison of ``changes``: FID minus the other row's, with its t interval."""
    rows = []
    for row, other in sweep.changes:
        mean, half = sweep.compare(row, other)
        names = dict(zip(("cell", "arm", "other_cell", "other_arm"), (*row, *other), strict=True))
        rows.append({**names, "difference": mean, "halfwidth": half})
    return pd.DataFrame(rows)


def _differences(sweep: Sweep, row: tuple[str, str]) -> str:
    found = [
        f"{tables.plus_minus(*sweep.compare(row, other), signed=True)} to {sweep.label(other, arm)}"
        for (cell, arm), other in sweep.changes
        if (cell, arm) == row
    ]
    return "; ".join(found) or "–"


def _cut(sweep: Sweep, cell: str) -> str:
    """Bounds of the ranges and sampling steps in each, where the sweep varies them."""
    known = sweep.cells.get(cell, {})
    if "range_cut" not in known.get("set", {}):
        return "–"
    parts = zip(known["ranges"], known["sampling_steps"], strict=True)
    return ", ".join(f"{start} to {stop - 1}: {steps}" for (start, stop), steps in parts)


def printed(sweep: Sweep) -> pd.DataFrame:
    """The table as printed; columns in which nothing is known are left out."""
    rows = table(sweep)
    cells = ["the base" if cell == BASE else cell for cell in rows["cell"]]
    fids = zip(rows["fid_mean"], rows["fid_sd"], strict=True)
    found = pd.DataFrame(
        {
            sweep.document["axis"]: cells,
            "arm": rows["title"],
            "FID ↓": [f"{tables.number(mean)} ± {tables.number(sd)}" for mean, sd in fids],
            "FID − pretrained": tables.differences(rows, "difference"),
            "FID compared": [_differences(sweep, row) for row in sweep.rows],
            "FID merged − routed": tables.differences(rows, "merging"),
            "weights": rows["weights"],
            "timesteps routed to each range: sampling steps": [
                _cut(sweep, c) for c, _ in sweep.rows
            ],
            "training steps": [f"{steps:,}" for steps in rows["training_steps"]],
            NOT_COMPARABLE: ["–" if pd.isna(x) else f"{x:.2f}" for x in rows["paper"]],
        }
    )
    return found.loc[:, (found != "–").any()]


def caption(sweep: Sweep) -> str:
    """What the numbers of a sweep are, and what its intervals leave out."""
    p, m, rows = sweep.parameters, sweep.metrics.iloc[0], table(sweep)
    seeds = sorted(sweep.metrics["seed"].unique().tolist())
    intervals = rows[["difference", "merging"]].count().sum() + len(sweep.changes)
    return (
        f"Sweep: {sweep.document['title']}. {p['dataset']}: n = {m['n']:,} images per row and "
        f"sampling seed, features {m['features']}, DDIM {m['steps']} steps, {len(seeds)} sampling "
        f"seeds ({', '.join(map(str, seeds))}), one training seed ({m['training_seed']}): all "
        "numbers are for these weights. ± sd is over sampling seeds and shared between rows (same "
        "noise). Differences are paired by sampling seed, with "
        f"{100 * p['confidence']:g} % t intervals; all {intervals} are exploratory and "
        "uncorrected, and cover sampling noise only: not training, the search, the data split or "
        "the classifier. "
        f"{_steps(rows)}. {_searches(sweep)}{_note(sweep)}"
        f"Of the base ({sweep.document['base']}): {'; '.join(sweep.document['beside'].values())}."
    )


def _steps(rows: pd.DataFrame) -> str:
    steps = rows.loc[rows["cell"] != BASE, "training_steps"].unique()
    if len(steps) == 1:
        return f"Every cell trains for {steps[0]:,} steps in total"
    return f"Cells train for {min(steps):,} to {max(steps):,} steps in total"


def _searches(sweep: Sweep) -> str:
    """The budget of the searches within cells; nothing where there are none."""
    results = [r for cell in sweep.cells.values() for r in cell["results"].values()]
    losses, images = (
        [r[name] for r in results if r["search_losses"]]
        for name in ("search_losses", "search_images")
    )
    if not losses:
        return ""
    return (
        "Every cell's weights were searched anew, with "
        f"{_between(losses)} losses tried and {_between(images)} images made. "
        + (NO_MERGE if any(r["search_losses"] and not any(r["weights"]) for r in results) else "")
    )


def _note(sweep: Sweep) -> str:
    note = " ".join(sweep.document["note"].split())
    return f"{note} " if note else ""


def _between(counts: list[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def render(records: Path, out: Path, name: str = "*") -> None:
    """Write ``sweeps/<name>.{csv,md,tex,png}`` and its comparisons: of one sweep, or of all."""
    for found in sorted((Path(records) / "sweeps").glob(f"{name}.json")):
        sweep = read(records, found.stem)
        path = Path(out) / "sweeps" / sweep.name
        path.parent.mkdir(parents=True, exist_ok=True)
        numbers, rows, text = table(sweep), printed(sweep), caption(sweep)
        write(path.with_suffix(".csv"), numbers.to_csv(index=False, float_format="%.6g"))
        compared = differences(sweep).to_csv(index=False, float_format="%.6g")
        write(path.with_name(f"{sweep.name}-compared.csv"), compared)
        write(path.with_suffix(".md"), f"{markdown(rows)}\n\n{text}\n")
        write(path.with_suffix(".tex"), latex(rows, text, f"sweep-{sweep.name}") + "\n")
        figure = plots.sweep(numbers, sweep.document["axis"], text)
        save(figure, path.with_suffix(".png"))
