"""Records to files: every table and figure of an experiment, and the README's generated parts."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from deme_lib.report import comparisons, plots, questions, sweep_tables, tables
from deme_lib.report.formats import latex, markdown, save, write


def render(records: Path, out: Path) -> None:
    """Write every table (.csv, .md, .tex) and figure (.png) of the records into ``out``.

    The same records give the same bytes: no dates, no versions in the files.
    """
    known = tables.read(records)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for number in tables.ABLATIONS:
        _write_ablation(known, number, out / f"ablation{number}")
    _write_paired(known, out / "paired")
    write(out / "verdicts.md", verdicts_markdown(known))
    write(out / "questions.md", questions_markdown(known, Path(records) / "sweeps"))
    for name, draw in _figures(known).items():
        save(draw(), out / f"{name}.png")
    sweep_tables.render(records, out)


def update_readme(readme: Path, figures: Path) -> None:
    """Put ``figures/NAME.md`` between ``<!-- NAME -->`` and ``<!-- /NAME -->`` of the README.

    Raises:
        ValueError: the README lacks a pair of markers.
    """
    text = Path(readme).read_text()
    for name in ("ablation1", "ablation2", "verdicts"):
        if not (Path(figures) / f"{name}.md").is_file():
            raise FileNotFoundError(
                f"no {figures}/{name}.md: `python -m deme_lib render {figures}` writes it"
            )
        generated = (Path(figures) / f"{name}.md").read_text().strip()
        block = f"<!-- {name} -->\n{generated}\n<!-- /{name} -->"
        pattern = rf"<!-- {name} -->.*?<!-- /{name} -->"
        text, found = re.subn(pattern, lambda _, block=block: block, text, flags=re.DOTALL)
        if not found:
            raise ValueError(f"{readme} has no <!-- {name} --> ... <!-- /{name} -->")
    write(Path(readme), text)


def printed(table: pd.DataFrame, second: str = "") -> pd.DataFrame:
    """An ablation table as printed: mean ± sd, KID times 1000, a dash where nothing is known.

    Args:
        table: from ``tables.ablation``.
        second: name of the second feature space; without one its FID is left out.
    """
    search = table[["search_losses", "search_images"]].apply(_pair, axis=1)
    by_second = {f"FID ({second}) ↓": _mean_sd(table, "fid_second")} if second else {}
    return pd.DataFrame(
        {
            "arm": table["title"],
            "FID ↓": _mean_sd(table, "fid"),
            **by_second,
            "pixel distance ↓": _mean_sd(table, "pixel"),
            "IS ↑": table["inception_score_mean"].map(tables.number),
            "KID × 1000 ↓": _kid(table),
            "precision ↑": table["precision_mean"].map(tables.number),
            "recall ↑": table["recall_mean"].map(tables.number),
            "test loss ↓": table["test_loss"].map(lambda x: "–" if pd.isna(x) else f"{x:.5f}"),
            "parameters held": table["parameters"].map(tables.count),
            "denoiser calls per image": table["calls_per_image"].map(tables.count),
            "training steps": table["training_steps"].map(tables.count),
            "search: losses tried / images made": search,
        }
    )


def _figures(known: tables.Records) -> dict:
    p = known.parameters
    one = f"{p['dataset']}, training seed {known.training_seeds[0]}"
    loss = f"{one}: {p['test_images']:,} test images, {p['loss_draws']} draws each"
    held = f"{one}: {p['search_images']:,} search images, {p['loss_draws']} draws each"
    scored = f"{held}; FID of {p['search_samples']:,} images per candidate"
    timesteps = p["num_train_timesteps"]
    return {
        "main": lambda: plots.main(known),
        "samples": lambda: plots.samples(known.samples, known.titles, one),
        "loss_per_timestep": lambda: plots.loss_per_timestep(known.losses, loss),
        "gradient_similarity": lambda: plots.gradient_similarity(known.gradients, one, timesteps),
        "activations": lambda: plots.activations(known.activations, one),
        "landscape": lambda: plots.landscape(known.landscape, held),
        "task_vectors": lambda: plots.task_vectors(known.task_vectors, one),
        "plane": lambda: plots.plane(known.plane, held),
        "cost": lambda: plots.cost(known),
        "search": lambda: plots.search(known.search, scored),
        "pretraining": lambda: plots.history(known.history, held),
        "neighbours": lambda: plots.neighbours(known.neighbours, one),
    }


def ablation_markdown(known: tables.Records, number: int) -> str:
    """The table of ablation 1 or 2 with its caption."""
    table = printed(tables.ablation(known, number), known.parameters["second_features"])
    return f"{markdown(table)}\n\n{_caption(known, number)}\n"


def paired_markdown(known: tables.Records, number: int) -> str:
    """The paired differences of ablation 1 or 2 with what their intervals mean."""
    paired = comparisons.paired(known, number)
    text = f"### Ablation {number}, {tables.ABLATIONS[number]}\n\n"
    text += f"{markdown(_printed_paired(known, paired))}\n"
    a, b = comparisons.IN_PLACE_ONLY
    if paired.query("a == @a and b == @b").empty:
        return text
    return (
        f"{text}\nThe {known.titles[b]} is the output-space merge at weights 1/N: against "
        f"{known.titles[a]} it differs only in where the experts are combined.\n"
    )


def _caption(known: tables.Records, number: int) -> str:
    return f"Ablation {number}, {tables.ABLATIONS[number]}. {tables.caption(known)}"


def _write_ablation(known: tables.Records, number: int, path: Path) -> None:
    table = tables.ablation(known, number)
    write(path.with_suffix(".csv"), table.to_csv(index=False, float_format="%.6g"))
    write(path.with_suffix(".md"), ablation_markdown(known, number))
    shown = printed(table, known.parameters["second_features"])
    write(path.with_suffix(".tex"), latex(shown, _caption(known, number), path.name) + "\n")


def limits(known: tables.Records) -> str:
    """What paired differences and their intervals are."""
    several = len(known.training_seeds) > 1
    over = "training and sampling seeds" if several else "sampling seeds"
    crossed = "random and crossed, degrees of freedom by Satterthwaite's formula"
    seeds = f"take both kinds of seeds as {crossed}" if several else "are of one training seed"
    return (
        f"Differences a − b paired over {over}, mean ± half-width of the t interval at the "
        "level named; negative: a is better (inception score, IS: positive). "
        "Primary comparisons were named before the run and are Bonferroni-corrected within their "
        "ablation; exploratory ones are not corrected. The verdict reads FID. The intervals "
        f"{seeds}. They {tables.covers(known)}."
    )


def _write_paired(known: tables.Records, path: Path) -> None:
    parts = [comparisons.paired(known, number) for number in tables.ABLATIONS]
    write(path.with_suffix(".csv"), pd.concat(parts).to_csv(index=False, float_format="%.6g"))
    text = [f"{limits(known)} {tables.setting(known)}.\n"]
    text += [paired_markdown(known, number) for number in tables.ABLATIONS]
    write(path.with_suffix(".md"), "\n".join(text))


def _printed_paired(known: tables.Records, part: pd.DataFrame) -> pd.DataFrame:
    titles, second = known.titles, known.parameters["second_features"]
    scaled = part.assign(kid=1000 * part["kid"], kid_halfwidth=1000 * part["kid_halfwidth"])
    printed = pd.DataFrame(
        {
            "a − b": part["a"].map(titles) + " − " + part["b"].map(titles),
            "kind": part["kind"],
            "level": part["level"].map(lambda level: f"{100 * level:.4g} %"),
            "FID": tables.differences(part, "fid"),
            f"FID ({second})": tables.differences(part, "fid_second"),
            "pixel distance": tables.differences(part, "pixel"),
            "KID × 1000": tables.differences(scaled, "kid"),
            "IS (higher is better)": tables.differences(part, "inception_score"),
            "verdict": part["verdict"],
        }
    )
    return printed.loc[:, (printed != "–").any()]


def verdicts_markdown(known: tables.Records) -> str:
    """What the numbers say, in paragraphs: in short, the metric, each ablation, copying."""
    parts = [comparisons.verdict(known, number) for number in tables.ABLATIONS]
    first, last = (
        [comparisons.in_short(known), comparisons.metric(known)],
        comparisons.copying(known),
    )
    return "\n\n".join([*first, *parts, last]) + "\n"


def questions_markdown(known: tables.Records, sweeps: Path) -> str:
    """The questions that the paper leaves open: the rows that answer each, and a sentence."""
    text = f"# Questions the paper leaves open\n\n{limits(known)} {tables.setting(known)}.\n"
    for number, answer in enumerate(questions.answers(known, sweeps), 1):
        text += f"\n## {number}. {answer.question}\n\n"
        text += f"{answer.text}\n"
        if len(answer.table):
            text += f"\n{markdown(answer.table)}\n"
    return text


def _mean_sd(table: pd.DataFrame, name: str) -> list[str]:
    pairs = zip(table[f"{name}_mean"], table[f"{name}_sd"], strict=True)
    return [
        tables.number(mean) + ("" if pd.isna(sd) else f" ± {tables.number(sd)}")
        for mean, sd in pairs
    ]


def _kid(table: pd.DataFrame) -> list[str]:
    """KID times 1000 with one decimal; a true minus sign."""
    scaled = 1000 * table[["kid_mean", "kid_sd"]].astype(float)
    cells = [" ± ".join(f"{x:.1f}" for x in row if not pd.isna(x)) for row in scaled.to_numpy()]
    return [cell.replace("-", "−") or "–" for cell in cells]


def _pair(row: pd.Series) -> str:
    if row.isna().any() or not row.any():
        return "–"
    return " / ".join(map(tables.count, row))
