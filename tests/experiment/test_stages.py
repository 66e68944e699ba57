"""Stages: made once, resumed where killed, refused early; on an experiment of seconds."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image
from safetensors.torch import load_file

from deme_lib.diffusion import data, metrics
from deme_lib.diffusion.heldout import FixedNoise
from deme_lib.diffusion.models import ModelError, load_pipeline, load_unet
from deme_lib.diffusion.training import Training
from deme_lib.experiment import parameters, recipes, records, stages
from deme_lib.experiment.arms import ARMS, present
from deme_lib.experiment.stages import estimate
from deme_lib.experiment.store import Store
from deme_lib.report import render, tables


class Killed(BaseException):
    """What a test kills a stage with."""


TINY = {
    "train_images": 1200,
    "search_images": 10,
    "test_images": 10,
    "model_channels": [8],
    "pretrain_steps": 8,
    "finetune_steps": 8,
    "batch_size": 4,
    "ema_decay": 0.5,
    "search_losses": 3,
    "search_candidates": 3,
    "search_samples": 8,
    "sampling_steps": 2,
    "samples": 8,
    "kid_subset_size": 4,
    "kid_subsets": 2,
    "is_splits": 2,
    "acceptance_samples": 8,
    "checkpoint_every": 2,
    "device": "cpu",
    "threads": 1,
}


@pytest.fixture
def experiment(tmp_path):
    """A function: the tiny experiment, ``experiment("folder", seeds=[1])``."""

    def make(runs="runs", **changes):
        values = TINY | {"runs_dir": str(tmp_path / runs)} | changes
        return parameters.load("params/smoke.yaml", **values)

    return make


@pytest.fixture
def forbid(monkeypatch):
    """A function: from now on these stages must not be run."""

    def forbid(*names):
        for name in names or stages.STAGES:
            monkeypatch.setitem(stages.STAGES, name, lambda job: pytest.fail(f"ran {job.label}"))

    return forbid


def contents(artefact):
    """What a stage made, without time and place."""
    return artefact.record["files"], artefact.results


# made once


def test_a_stage_makes_what_is_missing_upstream_once(experiment, forbid, capsys):
    p = experiment()
    made = stages.make(recipes.merged(p), p)
    assert "so made now: baseline, expert-1of2" in capsys.readouterr().out
    weights = made.results["weights"]
    assert len(weights) == 2 and all(0 <= w <= 1.5 for w in weights)
    assert len(load_pipeline(made.path / "pipeline").unet.config.block_out_channels) == 1
    assert not list(Store(p.runs_dir).root.glob(".partial/*"))

    forbid()
    again = stages.make(recipes.merged(p), p)
    assert again == made
    out = capsys.readouterr().out
    assert f"{again.path.name}: loaded" in out and "made now" not in out


def test_another_folder_gives_the_same_bytes(experiment):
    """Nor does how often a checkpoint is written change anything."""
    first, second = experiment(), experiment("elsewhere", checkpoint_every=5)
    merged = ARMS["merged"]
    for recipe in (
        recipes.baseline(first),
        recipes.images(first, merged),
        recipes.metrics(first, merged),
    ):
        assert contents(stages.make(recipe, first)) == contents(stages.make(recipe, second))


def test_the_size_of_batches_changes_rounding_only(experiment):
    images = []
    for p in (experiment(), experiment("elsewhere", sampling_batch=3)):
        made = stages.make(recipes.images(p, ARMS["pretrained"]), p)
        images.append(load_file(made.path / "images.safetensors")["seed0"].int())
    moved = (images[0] - images[1]).abs()
    assert moved.max() <= 1 and (moved > 0).float().mean() < 0.05


def test_every_artefact_of_an_experiment_can_be_made(experiment):
    p = experiment()
    everything = recipes.everything(p)
    made = stages.make_all(list(everything.values()), p)
    assert made.keys() == everything.keys()
    images = {
        a: load_file(made[f"images-{a}"].path / "images.safetensors")
        for a in (arm.name for arm in present("none"))
    }
    for name, found in images.items():
        assert set(found) == {"seed0", "seed1"} and found["seed0"].shape == (8, 1, 8, 8)
        results = made[f"metrics-{name}"].results
        assert [row["seed"] for row in results["rows"]] == [0, 1]
        assert all(np.isfinite(row["fid"]) and row["n"] == 8 for row in results["rows"])
    base = load_pipeline(made["baseline"].path / "pipeline").unet.num_parameters()
    assert made["images-pretrained"].results["parameters"] == base
    assert made["images-averaged"].results["calls_per_image"] == 2 * p.sampling_steps
    assert made["images-merged"].results["calls_per_image"] == p.sampling_steps
    assert made["images-output_merge"].results["weights"] == made["merged"].results["weights"]
    json.dumps([a.results for a in made.values()], allow_nan=False)  # nothing is nan


@pytest.mark.parametrize("changes", [{"seeds": [0, 1]}, {"loss_weighting": "p2", "n_ranges": 1}])
def test_tables_and_figures_of_other_experiments(experiment, changes):
    """Several training seeds; a re-weighted arm; one range alone."""
    p = experiment(**changes)
    folder = records.collect(p)
    known = tables.read(folder / "records")
    assert known.training_seeds == p.seeds
    assert set(known.arms["arm"]) == {arm.name for arm in present(p.loss_weighting)}
    render.render(folder / "records", folder)
    text = (folder / "ablation1.md").read_text()
    assert ("2 training seeds" in text) == (len(p.seeds) == 2)
    assert ("all timesteps, re-weighted" in text) == (p.loss_weighting != "none")


# killed and resumed


def interrupted(monkeypatch, where, name, at, recipe, p):
    """Make an artefact, killed in the call number ``at`` (from 0) of a method."""
    original, calls = getattr(where, name), []

    def method(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == at + 1:
            raise Killed
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(stages, "announce", lambda *_: None)  # it times a few steps of its own
        patch.setattr(where, name, method)
        stages.make(recipe, p)
    assert not Store(p.runs_dir).holds(recipe)


@pytest.fixture
def whole(experiment):
    """The baseline of a run that nobody killed."""
    p = experiment("whole")
    return contents(stages.make(recipes.baseline(p), p))


@pytest.mark.parametrize("step", [1, 3, 7])
def test_a_baseline_killed_in_a_step_is_resumed_exactly(experiment, whole, monkeypatch, step):
    p = experiment()
    interrupted(monkeypatch, Training, "_step", step, recipes.baseline(p), p)
    assert contents(stages.make(recipes.baseline(p), p)) == whole


@pytest.mark.parametrize("look", [0, 2, 4, 8])
def test_a_baseline_killed_while_looking_is_resumed_exactly(experiment, whole, monkeypatch, look):
    """The held-out loss is looked at after each step; snapshots are at steps 2 and 4."""
    p = experiment()
    interrupted(monkeypatch, FixedNoise, "loss", look, recipes.baseline(p), p)
    assert contents(stages.make(recipes.baseline(p), p)) == whole


def test_resuming_starts_from_the_checkpoint(experiment, monkeypatch):
    p, recipe, steps = experiment(), recipes.baseline(experiment()), []
    interrupted(monkeypatch, Training, "_step", 5, recipe, p)
    monkeypatch.setattr(stages, "announce", lambda *_: None)
    original = Training._step
    monkeypatch.setattr(
        Training, "_step", lambda self, step: steps.append(step) or original(self, step)
    )
    stages.make(recipe, p)
    assert steps == [4, 5, 6, 7]


def test_training_leaves_no_checkpoint_behind(experiment):
    p = experiment()
    made = stages.make(recipes.finetuned(p, "experts")[0], p)
    assert not [f for f in made.record["files"] if "checkpoint" in f or "history" in f]
    assert [point["step"] for point in made.results["history"]] == list(range(9))


@pytest.mark.parametrize("steps", [4, 5])
def test_a_baseline_of_hardly_any_steps_has_its_snapshots(experiment, steps):
    p = experiment(pretrain_steps=steps)
    path = stages.make(recipes.baseline(p), p).path
    for snapshot in ("snapshot-4", "snapshot-2"):
        load_unet(path / snapshot)


# a pretrained model


def test_a_pretrained_folder_is_used_instead_of_training(experiment, forbid, tiny_unet, tmp_path):
    unet = tiny_unet()
    DDPMPipeline(unet, DDPMScheduler(1000)).save_pretrained(tmp_path / "model")
    p = experiment(pretrained=str(tmp_path / "model"), consistency_weight=0.0)
    forbid("train_baseline")
    expert = stages.make(recipes.finetuned(p, "experts")[0], p)
    baseline = Store(p.runs_dir).load(recipes.baseline(p))
    loaded = load_pipeline(baseline.path / "pipeline").unet.state_dict()
    assert all(torch.equal(loaded[name], w) for name, w in unet.state_dict().items())
    trained = load_unet(expert.path / "unet").state_dict()
    assert set(loaded) < set(trained)  # projections were added
    assert any(not torch.equal(trained[name], w) for name, w in loaded.items())


def image_folder(root, size, count=60):
    rng = np.random.default_rng(0)
    (root / "train" / "0").mkdir(parents=True)
    for i in range(count):
        picture = Image.fromarray(rng.integers(0, 256, (size, size), np.uint8))
        picture.save(root / "train" / "0" / f"{i}.png")
    return str(root)


def test_images_of_another_size_are_refused_before_training(
    experiment, forbid, tiny_unet, tmp_path, monkeypatch
):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    DDPMPipeline(tiny_unet(), DDPMScheduler(1000)).save_pretrained(tmp_path / "model")
    folder = image_folder(tmp_path / "data", 16)
    p = experiment(pretrained=str(tmp_path / "model"), dataset=folder, train_images=40)
    forbid("finetune", "reference")
    with pytest.raises(ModelError, match=r"\(1, 8, 8\).*\(1, 16, 16\)"):
        stages.make(recipes.merged(p), p)


# the classifiers' split


def test_a_classifier_of_another_split_is_refused(experiment):
    p = experiment(split_seed=1)
    with pytest.raises(metrics.MetricError, match=r"digits-[ab] was trained on.*not on this split"):
        stages.make(recipes.reference(p), p)


def test_a_classifier_knows_its_images_wherever_they_come_from(experiment, tmp_path):
    schema = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(10)})
    images, labels = data.digits().images, data.digits().labels
    rows = {"image": [Image.fromarray(i[0]) for i in images], "label": labels.tolist()}
    made = datasets.Dataset.from_dict(rows, features=schema)
    made.to_parquet(tmp_path / "copy" / "train-00000-of-00001.parquet")
    p = experiment(dataset=str(tmp_path / "copy"))
    assert stages.make(recipes.reference(p), p).results["train.digits-a.values"] == [1200, 64]


def test_an_unreadable_image_stops_everything_before_training(experiment, forbid, tmp_path):
    for label in range(2):
        (tmp_path / "pictures" / str(label)).mkdir(parents=True)
        for i in range(20):
            picture = Image.fromarray(np.full((8, 8), i, np.uint8))
            picture.save(tmp_path / "pictures" / str(label) / f"{i}.png")
    damaged = tmp_path / "pictures" / "0" / "7.png"
    damaged.write_bytes(damaged.read_bytes()[:40])
    sizes = {"train_images": 20, "search_images": 10, "test_images": 10}
    p = experiment(dataset=str(tmp_path / "pictures"), features="inception", **sizes)
    forbid("train_baseline", "finetune", "reference")
    with pytest.raises(data.DataError, match=r"pictures: image \d+ cannot be read"):
        stages.make(recipes.merged(p), p)


# time


def test_hours_are_not_begun_unless_allowed(experiment, monkeypatch):
    monkeypatch.setattr(estimate, "LONGEST_S", 1e-6)
    p = experiment()
    with pytest.raises(estimate.TooLongError, match="allow_long"):
        stages.make(recipes.baseline(p), p)
    assert not list(Store(p.runs_dir).root.glob(".partial/*"))
    allowed = experiment(allow_long=True)
    assert stages.make(recipes.baseline(allowed), allowed).path.is_dir()
    stages.make(recipes.baseline(p), p)  # loading takes no time and needs no leave


def test_the_estimate_counts_what_is_missing(experiment, monkeypatch, capsys):
    monkeypatch.setattr(estimate, "_timings", lambda *_: (60.0, 1.0))
    p = experiment()
    experts = recipes.finetuned(p, "experts")
    missing = [recipes.baseline(p), *experts, recipes.images(p, ARMS["averaged"])]
    with pytest.raises(estimate.TooLongError):
        estimate.announce(missing * 20, Store(p.runs_dir), p)
    assert estimate.announce(missing, Store(p.runs_dir), p) is None
    steps, calls = 8 + 2 * 8, 2 * 8 * 2 * 2  # two members, samples, seeds, sampling steps
    assert f"{steps} optimiser steps of 60000 ms and {calls} denoiser" in capsys.readouterr().out


def test_stages_read_what_their_recipe_names(experiment):
    """A stage's parameters are its recipe's: another name is a KeyError, not a default."""
    p = experiment()
    job = stages.Job(
        recipes.baseline(p).parameters, {}, {}, Path("."), "baseline", torch.device("cpu"), 1, 1
    )
    assert job["pretrain_steps"] == 8
    with pytest.raises(KeyError):
        job["samples"]
