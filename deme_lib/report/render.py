"""Records to files: every table and figure of an experiment, and the README's table."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from deme_lib.report import intervals, plots, tables
from deme_lib.report.formats import save, write, write_csv
from deme_lib.report.records import Records, RecordsError, read

MARKERS = ("<!-- table -->", "<!-- /table -->")


def render(folder: Path) -> None:
    """Write tables (.csv, .md) and figures (.png) of ``figures/<experiment>`` from its records/.

    The same records give the same bytes: no dates, no versions in the files.
    """
    known = read(folder / "records")
    write_csv(folder / "table.csv", tables.table(known).reset_index())
    write(folder / "table.md", f"{tables.markdown_of(known)}\n\n{tables.caption(known)}\n")
    write_csv(folder / "comparisons.csv", intervals.comparisons(known))
    write(folder / "comparisons.md", f"{tables.compared_markdown(known)}\n")
    for name, draw in figures(known).items():
        save(draw(), folder / f"{name}.png")


def ladder(folders: list[Path], out: Path) -> None:
    """Write ladder.csv and ladder.png into a folder, of experiments that differ in model size."""
    sizes = [read(folder / "records") for folder in folders]
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "ladder.csv", gains := intervals.ladder(sizes))
    save(plots.ladder(gains, sizes[0]), out / "ladder.png")


def figures(known: Records) -> dict[str, Callable[[], Figure]]:
    """Name -> what draws it, for every figure whose record is there."""
    p = known.parameters
    if known.arms["cell"].nunique() > 1:
        name = "samplers" if known.metrics["sampler"].nunique() > 1 else "cells"
        drawn = {name: partial(getattr(plots, name), known)}
    else:
        drawn = {"method": partial(plots.method, p["n_ranges"])}
        names = ["main", "loss_per_timestep", "cost"]
        names += [] if intervals.gate(known).empty else ["gate"]
        drawn |= {name: partial(getattr(plots, name), known) for name in names}
    one = f"{p['dataset']}, training seed {known.training_seeds[0]}"
    held = f"{one}: n = {p['loss_images']:,} search images."
    paper = {
        "history": ("history", held),
        "gradient_similarity": ("gradients", one, p["num_train_timesteps"]),
        "activations": ("activations", one),
        "landscape": ("landscape", held),
        "task_vectors": ("task_vectors", one),
        "plane": ("plane", held),
    }
    for name, (kind, *about) in paper.items():
        if kind in known.looks:
            drawn[name] = partial(getattr(plots, name), known.looks[kind], *about)
    if known.samples:
        sampled = f"{one}, {tables.sampler(known)}"
        drawn["samples"] = partial(plots.samples, known.samples, known.titles, sampled)
    return drawn


def fill_readme(path: Path, folder: Path) -> None:
    """Put the table of ``figures/<experiment>`` between the two markers of a Markdown file.

    Raises:
        RecordsError: the file has not each marker once.
    """
    text = path.read_text(encoding="utf-8")
    if [text.count(marker) for marker in MARKERS] != [1, 1]:
        raise RecordsError(f"{path} needs each of {' and '.join(MARKERS)} once")
    before, _, rest = text.partition(MARKERS[0])
    table, after = tables.readme(read(folder / "records")), rest.partition(MARKERS[1])[2]
    write(path, f"{before}{MARKERS[0]}\n{table}\n{MARKERS[1]}{after}")
