"""Records to files: every table and figure of an experiment and of its sweeps."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from deme_lib.report import intervals, observations, plots, records, searches, tables
from deme_lib.report.formats import latex, markdown, number, save, write, write_csv
from deme_lib.report.records import Records


def render(folder: Path) -> None:
    """Write every table (.csv, .md, .tex) and figure (.png) of ``figures/<experiment>``.

    From ``records/`` and ``sweeps/*/records/`` there, whichever it has. The same records give the
    same bytes: no dates, no versions in the files.
    """
    found = sorted(path.parent for path in folder.glob("sweeps/*/records"))
    if any((folder / "records").glob("seed-*")) or not found:
        _experiment(records.read(folder / "records"), folder)
    for path in found:
        known, out = records.read(path / "records"), folder / "sweeps"
        _tables(known, out / known.name, out / f"{known.name}-comparisons")
        save(plots.sweep(known), out / f"{known.name}.png")


def _experiment(known: Records, out: Path) -> None:
    _tables(known, out / "table", out / "comparisons")
    if len(known.gate):
        write_csv(out / "gate.csv", intervals.gate(known))
    searched = searches.table(known)
    if len(searched):
        write_csv(out / "searches.csv", searched)
        write(out / "searches.md", f"{markdown(searches.printed(searched))}\n")
    seen = observations.table(known)
    if len(seen):
        write(out / "observations.md", f"{markdown(seen)}\n")
    for name, draw in figures(known).items():
        save(draw(), out / f"{name}.png")


def _tables(known: Records, path: Path, beside: Path) -> None:
    """``path`` with a row per arm, ``beside`` with one per comparison."""
    shown, caption, note = tables.printed(known), tables.caption(known), tables.note(known)
    write_csv(path.with_suffix(".csv"), tables.table(known))
    text = f"{markdown(shown)}\n\n{caption}.\n" + (f"\n{note}\n" if note else "")
    write(path.with_suffix(".md"), text)
    write(path.with_suffix(".tex"), latex(shown, caption, path.name))
    compared = intervals.comparisons(known)
    write_csv(beside.with_suffix(".csv"), compared)
    margin = compared.loc[compared["measure"] == "fid", "margin"].max()
    said = "all exploratory, uncorrected" if known.sweep else "only primary ones Holm-corrected"
    said += "" if np.isnan(margin) else f"; margin of FID {number(margin)}"
    text = f"{markdown(tables.compared(compared))}\n\n{caption}; {said}.\n"
    write(beside.with_suffix(".md"), text)


def figures(known: Records) -> dict[str, Callable[[], Figure]]:
    """Name -> what draws it, for every figure whose record is there."""
    p, seed = known.parameters, known.training_seeds[0]
    first = {name: df[df["training_seed"] == seed] for name, df in known.frames.items()}
    one = f"{p['dataset']}, training seed {seed}"
    held = f"{one}: n = {p['loss_images']:,} search images"
    seeds = f"training seeds {' '.join(map(str, known.training_seeds))}"
    test = f"{p['dataset']}: n = {p['test_images']:,} test images, {seeds}"
    gate = f"{p['dataset']}: n = {known.gate['images'].max():,} test images, {seeds}; "
    gate += "small: each, interval over images; large: mean, t interval"

    def of(name: str) -> str:
        return f"{one}: n = {first[name]['n'].min():,} images"

    drawn = {
        "history": (first["history"], held),
        "gradient_similarity": (
            first["gradients"],
            of("gradients"),
            p["num_train_timesteps"],
        ),
        "activations": (first["activations"], of("activations")),
        "landscape": (first["landscape"], held),
        "task_vectors": (first["task_vectors"], one),
        "plane": (first["plane"], held),
        "neighbours": (first["neighbours"], of("neighbours")),
    }
    found = {
        name: partial(getattr(plots, name), *given)
        for name, given in drawn.items()
        if len(given[0])
    }
    found["main"] = partial(plots.main, known)
    if len(known.losses):
        found["loss_per_timestep"] = partial(plots.loss_per_timestep, known, test)
    shown = [intervals.headline(known, number) for number in intervals.ABLATIONS]
    if {arm for arm in known.titles if "@" not in arm}.difference(*shown):
        found["controls"] = partial(plots.controls, known)
    if len(known.gate):
        found["gate"] = partial(plots.gate, known, gate)
    if any("@" in arm for _, arm in known.rows):
        found["ema_horizon"] = partial(plots.ema_horizon, known)
    if known.samples:
        titles = {arm: title for arm, title in known.titles.items() if "@" not in arm}
        found["samples"] = partial(plots.samples, known.samples, titles, one)
    return found
