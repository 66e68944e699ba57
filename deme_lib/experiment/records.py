"""From stored artefacts to records: the small CSV and JSON files behind every table and figure.

Each function turns artefacts into a DataFrame; ``collect`` makes what is missing and writes the
whole folder that ``tables`` reads.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.numpy import save_file
from safetensors.torch import load_file

from deme_lib import ROOT
from deme_lib.experiment import recipes
from deme_lib.experiment.arms import ARMS, SEARCHES, Arm, present, search_of
from deme_lib.experiment.parameters import Parameters
from deme_lib.experiment.stages import make_all
from deme_lib.experiment.store import Artefact, provenance, write_text

SAMPLES_SHOWN = 16


def figures_folder(p: Parameters, as_shipped: bool = True) -> Path:
    """``figures/<experiment>`` where every parameter equals the preset's file, else under runs.

    ``as_shipped=False`` says that something besides the parameters is not what was committed.
    """
    shipped = as_shipped and p.is_preset()
    return (ROOT if shipped else ROOT / p.runs_dir) / "figures" / p.folder_name()


def history(artefacts: Iterable[Artefact]) -> pd.DataFrame:
    """Held-out denoising loss of the EMA weights over the steps of training runs."""
    rows = [{"run": _label(a), **point} for a in artefacts for point in a.results["history"]]
    return pd.DataFrame(rows, columns=["run", "step", "learning_rate", "held_out_loss"])


def gradients(by_model: dict[str, Artefact]) -> pd.DataFrame:
    """Cosine similarity of the loss's gradients between timesteps (Fig. 1a), per noise draw."""
    rows = []
    for model, artefact in by_model.items():
        timesteps = artefact.results["timesteps"]
        pairs = list(itertools.product(enumerate(timesteps), repeat=2))
        for draw, cosines in enumerate(artefact.results["draws"]):
            place = {"model": model, "draw": draw, "n": artefact.results["n"]}
            rows += [
                {**place, "timestep1": a, "timestep2": b, "cosine": cosines[i][j]}
                for (i, a), (j, b) in pairs
            ]
    return pd.DataFrame(rows)


def activations(artefact: Artefact) -> pd.DataFrame:
    """Where activations changed, per range, block and dimension (Fig. 2)."""
    return pd.DataFrame(artefact.results["rows"])


def landscape(artefact: Artefact) -> pd.DataFrame:
    """Held-out loss around the pretrained weights (Fig. 4)."""
    return pd.DataFrame(artefact.results["points"])


def task_vectors(artefact: Artefact) -> pd.DataFrame:
    """Quantiles of task-vector values per range and part of the UNet (Fig. 6b)."""
    return pd.DataFrame(
        [
            {"range": k + 1, "block": block, **values}
            for k, blocks in enumerate(artefact.results["quantiles"])
            for block, values in blocks.items()
        ]
    )


def plane(artefact: Artefact) -> pd.DataFrame:
    """Held-out loss over two merge weights (Fig. 6a)."""
    expert1, expert2 = artefact.results["experts"]
    return pd.DataFrame(artefact.results["points"]).assign(expert1=expert1, expert2=expert2)


def range_losses(artefact: Artefact) -> pd.DataFrame:
    """Held-out loss of each model in each range."""
    return pd.DataFrame(artefact.results["losses"])


def search(artefacts: dict[str, Artefact]) -> pd.DataFrame:
    """Every candidate of every search; ``chosen`` marks the weights it ended with."""
    rows = [
        {
            "search": name,
            "weights": json.dumps(candidate["weights"]),
            "loss": candidate["loss"],
            "fid": candidate["fid"],
            "chosen": int(candidate["weights"] == artefact.results["weights"]),
        }
        for name, artefact in artefacts.items()
        for candidate in artefact.results["candidates"]
    ]
    return pd.DataFrame(rows, columns=["search", "weights", "loss", "fid", "chosen"])


def images(artefact: Artefact) -> np.ndarray:
    """An arm's images of its first sampling seed, uint8 [n, C, H, W]."""
    first = artefact.record["parameters"]["sampling_seeds"][0]
    return load_file(artefact.path / "images.safetensors")[f"seed{first}"].numpy()


def metrics(made: dict[str, Artefact], training_seed: int) -> pd.DataFrame:
    """A row per arm and sampling seed of one training seed, from artefacts by label."""
    stored = {name: made[f"metrics-{name}"] for name in ARMS if f"metrics-{name}" in made}
    rows = [
        {"arm": name, "training_seed": training_seed, **row}
        for name, artefact in stored.items()
        for row in artefact.results["rows"]
    ]
    first = ["arm", "training_seed", "seed", "n", "features", "steps", "fid", "fid_second"]
    return pd.DataFrame(rows).pipe(lambda df: df[[*first, *df.columns.drop(first)]])


def arm_row(p: Parameters, arm: Arm, images: Artefact, searches: dict[str, Artefact]) -> dict:
    """What an arm is and costs, beside its test loss."""
    name = search_of(arm, p.merge_weights)
    cost = searches[name].results if name else {"losses": 0, "images": 0}
    return {
        "arm": arm.name,
        "training_seed": p.seed,
        "title": arm.title,
        "ablation1": int(1 in arm.ablations),
        "ablation2": int(2 in arm.ablations),
        "parameters": images.results["parameters"],
        "calls_per_image": images.results["calls_per_image"],
        "training_steps": sum(r.training_steps for r in recipes.finetuned(p, arm.members)),
        "search_losses": cost["losses"],
        "search_images": cost["images"],
        "weights": json.dumps(images.results["weights"]) if images.results["weights"] else "",
        "test_loss": images.results["test_loss"],
    }


def collect(p: Parameters) -> Path:
    """Make whatever is missing, then write the records of the whole experiment.

    Returns:
        The folder of figures and tables; the records are in its ``records/``.
    """
    by_seed = [(q, make_all(list(recipes.everything(q).values()), q)) for q in p.per_seed()]
    first, made = by_seed[0]
    acceptance = dict(made["acceptance"].results)
    documents = {"real": acceptance.pop("real"), "acceptance": acceptance, "run": _run(p, by_seed)}
    frames = _frames(first, made) | {
        "metrics": pd.concat([metrics(m, q.seed) for q, m in by_seed]),
        "arms": pd.concat([arms(q, m) for q, m in by_seed]),
        "timing": pd.concat([timing(q, m) for q, m in by_seed]),
    }
    out = figures_folder(p)
    _write(out / "records", frames, documents)
    _write_samples(out / "records", made)
    return out


def arms(p: Parameters, made: dict[str, Artefact]) -> pd.DataFrame:
    """A row per arm of one training seed."""
    searches = {n: made[f"search-{n}"] for n in SEARCHES if f"search-{n}" in made}
    return pd.DataFrame(
        [arm_row(p, arm, made[f"images-{arm.name}"], searches) for arm in present(p.loss_weighting)]
    )


def _frames(p: Parameters, made: dict[str, Artefact]) -> dict[str, pd.DataFrame]:
    """Everything but the arms' metrics: of one training seed."""
    names = [arm.name for arm in present(p.loss_weighting)]
    images = {name: made[f"images-{name}"] for name in names}
    neighbours = {name: made[f"metrics-{name}"].results["neighbours"] for name in names}
    searches = {n: made[f"search-{n}"] for n in SEARCHES if f"search-{n}" in made}
    families = ("experts", "all_same", "all_plain", "soup")
    if p.loss_weighting != "none":
        families += ("reweighted",)
    runs = [made[r.label] for family in families for r in recipes.finetuned(p, family)]
    test = {"arm": "test", **made["metrics-pretrained"].results["test_neighbours"]}
    rows = {
        "losses": [{"arm": n, **row} for n, a in images.items() for row in a.results["losses"]],
        "neighbours": [{"arm": n, **found} for n, found in neighbours.items()] + [test],
    }
    return {name: pd.DataFrame(found) for name, found in rows.items()} | {
        "search": search(searches),
        "history": history([made["baseline"], *runs]),
        "gradients": gradients(
            {"pretrained": made["gradients"], "merged": made["gradients-merged"]}
        ),
        "task_vectors": task_vectors(made["task-vectors"]),
        "plane": plane(made["plane"]),
        "activations": activations(made["activations"]),
        "landscape": landscape(made["landscape"]),
        "range_losses": range_losses(made["range-losses"]),
    }


def timing(p: Parameters, made: dict[str, Artefact]) -> pd.DataFrame:
    """Seconds, peak memory and throughput per artefact, as measured when it was made."""
    rows = []
    for label, recipe in recipes.everything(p).items():
        record = made[label].record
        count = p.samples * len(p.sampling_seeds) if recipe.stage == "images" else 0
        rows.append(
            {
                "training_seed": p.seed,
                "artefact": label,
                "seconds": record["seconds"],
                "process_peak_memory_mib": record.get("process_peak_memory_mib"),
                "training_steps": recipe.training_steps,
                "denoiser_calls": recipe.denoiser_calls,
                "images_per_second": round(count / record["seconds"], 1) if count else None,
                "device": record["device"],
            }
        )
    return pd.DataFrame(rows)


def _run(p: Parameters, by_seed: list[tuple[Parameters, dict[str, Artefact]]]) -> dict[str, Any]:
    records = [artefact.record for _, made in by_seed for artefact in made.values()]
    return {
        "experiment": p.experiment,
        "parameters": p.model_dump(),
        "device": ", ".join(sorted({r["device"] for r in records})),
        "cpu_threads": p.threads,
        "commits": sorted({f"{r['commit']}{'+' if r['dirty'] else ''}" for r in records}),
        **provenance(),
    }


def _write(folder: Path, frames: dict[str, pd.DataFrame], documents: dict[str, dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in frames.items():
        write_text(folder / f"{name}.csv", frame.to_csv(index=False))
    for name, document in documents.items():
        write_text(folder / f"{name}.json", json.dumps(document, indent=1, sort_keys=True) + "\n")


def _write_samples(folder: Path, made: dict[str, Artefact]) -> None:
    arms_made = [name for name in ARMS if f"images-{name}" in made]
    shown = {name: images(made[f"images-{name}"])[:SAMPLES_SHOWN] for name in arms_made}
    real = load_file(made["data"].path / "images.safetensors")["train"]
    shown["real"] = real[: min(map(len, shown.values()))].numpy()
    save_file(shown, folder / "samples.tmp")
    (folder / "samples.tmp").replace(folder / "samples.safetensors")


def _label(artefact: Artefact) -> str:
    name, key = artefact.record["name"], artefact.record["key"]
    return name.removesuffix(f"-{key}")
