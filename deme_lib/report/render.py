"""Records to files: every table and figure of an experiment and of its sweeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from deme_lib.report import intervals, observations, plots, records, tables
from deme_lib.report.formats import latex, markdown, number, save, write, write_csv
from deme_lib.report.records import Records


def render(folder: Path, out: Path | None = None) -> None:
    """Write every table (.csv, .md, .tex) and figure (.png) of ``figures/<experiment>``.

    From ``records/`` and ``sweeps/*/records/`` there, whichever it has, into ``out`` or the folder
    itself. The same records give the same bytes: no dates, no versions in the files.
    """
    folder = Path(folder)
    out = Path(out or folder)
    found = sorted(path.parent for path in folder.glob("sweeps/*/records"))
    if any((folder / "records").glob("seed-*")) or not found:
        _experiment(records.read(folder / "records"), out)
    for path in found:
        _sweep(records.read(path / "records"), out / "sweeps")


def _experiment(known: Records, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    _table(known, out / "table")
    _comparisons(known, out / "comparisons")
    if len(known.gate):
        write_csv(out / "gate.csv", intervals.gate(known))
    seen = observations.table(known)
    if len(seen):
        write(out / "observations.md", f"{markdown(seen)}\n")
    for name, draw in figures(known).items():
        save(draw(), out / f"{name}.png")


def _sweep(known: Records, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    _table(known, out / known.name)
    _comparisons(known, out / f"{known.name}-comparisons")
    save(plots.sweep(known), out / f"{known.name}.png")


def _table(known: Records, path: Path) -> None:
    shown, caption = tables.printed(known), tables.caption(known)
    write_csv(path.with_suffix(".csv"), tables.table(known))
    note = tables.note(known)
    text = f"{markdown(shown)}\n\n{caption}.\n" + (f"\n{note}\n" if note else "")
    write(path.with_suffix(".md"), text)
    write(path.with_suffix(".tex"), latex(shown, caption, path.name) + "\n")


def _comparisons(known: Records, path: Path) -> None:
    found = intervals.comparisons(known)
    write_csv(path.with_suffix(".csv"), found)
    margin = found.loc[found["measure"] == "fid", "margin"].max()
    said = "all exploratory, uncorrected" if known.sweep else "only primary ones Holm-corrected"
    said += "" if np.isnan(margin) else f"; margin of FID {number(margin)}"
    text = f"{markdown(tables.compared(found))}\n\n{tables.caption(known)}; {said}.\n"
    write(path.with_suffix(".md"), text)


def figures(known: Records) -> dict[str, Callable[[], Figure]]:
    """Name -> what draws it, for every figure whose record is there."""
    p, frames = known.parameters, {name: known.of_first(name) for name in known.frames}
    frames["losses"] = known.losses  # of all training seeds
    frames["neighbours"] = frames["neighbours"][~frames["neighbours"]["arm"].str.contains("@")]
    one = f"{p['dataset']}, training seed {known.training_seeds[0]}"
    held = f"{one}: {p['search_images']:,} search images"
    test = f"{p['dataset']}: {p['test_images']:,} test images, training seeds "
    test += " ".join(map(str, known.training_seeds))
    gate = f"{p['dataset']}: n = {known.gate['images'].max():,} test images, intervals over "
    gate += "images (small) and training seeds (large)"
    panels = {f"ablation {n}: {what}": known.arms_of(n) for n, what in intervals.ABLATIONS.items()}

    def of(name: str) -> str:
        """n of a record that has it, as printed."""
        return f"{one}: n = {frames[name]['n'].min():,}"

    drawn = {
        "losses": ("loss_per_timestep", lambda df: plots.loss_per_timestep(df, test, panels)),
        "gate": ("gate", lambda df: plots.gate(known, gate)),
        "history": ("history", lambda df: plots.history(df, held)),
        "gradients": (
            "gradient_similarity",
            lambda df: plots.gradient_similarity(df, of("gradients"), p["num_train_timesteps"]),
        ),
        "activations": ("activations", lambda df: plots.activations(df, of("activations"))),
        "landscape": ("landscape", lambda df: plots.landscape(df, held)),
        "task_vectors": ("task_vectors", lambda df: plots.task_vectors(df, one)),
        "plane": ("plane", lambda df: plots.plane(df, held)),
        "search": ("search", lambda df: plots.search(df, f"{held}; {p['features']} features")),
        "neighbours": ("neighbours", lambda df: plots.neighbours(df, of("neighbours"))),
    }
    found = {"main": lambda: plots.main(known)}
    if any("@" in arm for _, arm in known.rows):
        found["ema_horizon"] = lambda: plots.ema_horizon(known)
    if known.samples:
        shown = {arm: images for arm, images in known.samples.items() if "@" not in arm}
        found["samples"] = lambda: plots.samples(shown, known.titles, one)
    for record, (name, draw) in drawn.items():
        if len(frames[record]):
            found[name] = lambda draw=draw, record=record: draw(frames[record])
    return found
