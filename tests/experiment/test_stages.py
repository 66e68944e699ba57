"""Stages: made once, resumed where killed, refused early; on an experiment of seconds."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from safetensors.torch import load_file

from deme_lib.diffusion import sampling
from deme_lib.diffusion.models import load_pipeline, load_unet
from deme_lib.experiment import collect, parameters, recipes, stages
from deme_lib.experiment.arms import ARMS, arm_of
from deme_lib.experiment.stages import evaluate, job
from deme_lib.experiment.store import Store
from deme_lib.report import render, tables
from deme_lib.report.records import read

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
    "search_streams": 2,
    "sampling_steps": 2,
    "samples": 8,
    "kid_subset_size": 4,
    "kid_subsets": 2,
    "is_splits": 2,
    "acceptance_samples": 8,
    "loss_images": 10,
    "device": "cpu",
    "threads": 1,
}


@pytest.fixture
def experiment(tmp_path):
    """A function: the tiny experiment of one seed, ``experiment("folder", seeds=[1])``."""

    def make(runs="runs", **changes):
        places = {"runs_dir": str(tmp_path / runs), "figures_dir": str(tmp_path / "figures")}
        values = TINY | {"seeds": [0], "sampling_seeds": [0, 1]} | places | changes
        return parameters.load("params/smoke.yaml", **values)

    return make


@pytest.fixture
def forbid(monkeypatch):
    """A function: from now on these stages must not be run."""

    def forbid(*names):
        for name in names or stages.STAGES:
            monkeypatch.setitem(stages.STAGES, name, lambda job: pytest.fail(f"ran {job.label}"))

    return forbid


def record(artefact, name):
    return pd.read_csv(artefact.path / f"{name}.csv")


# made once


def test_a_stage_makes_what_is_missing_upstream_once(experiment, forbid, capsys):
    p = experiment()
    made = stages.make(recipes.merged(p), p)
    assert "made now: data, baseline, deme-1of2" in capsys.readouterr().out
    assert made.results["weights"] == [0.5, 0.5]
    assert len(load_pipeline(made.path / "pipeline").unet.config.block_out_channels) == 1
    assert not list(Store(p.runs_dir).root.glob(".partial/*"))
    forbid()
    assert stages.make(recipes.merged(p), p) == made
    assert "made now" not in capsys.readouterr().out


def test_the_size_of_batches_changes_rounding_only(experiment):
    """Before rounding to grey levels a barely trained network moves by its dtype's rounding."""
    images = []
    for p in (experiment(), experiment("elsewhere", sampling_batch=3)):
        made = stages.make(recipes.images(p, ARMS["pretrained"]), p)
        images.append(load_file(made.path / "images.safetensors")["seed0"].int())
    moved = (images[0] - images[1]).abs()
    assert (moved > 1).float().mean() < 0.05


def test_images_in_shards_are_kept_and_scored_one_at_a_time(experiment, monkeypatch):
    """A run that stops in the second goes on there; scores are those of one file."""
    whole, apart = experiment(), experiment("elsewhere", sampling_batch=3)
    arm = ARMS["pretrained"]
    scores = [record(stages.make(recipes.metrics(whole, arm), whole), "metrics")]
    for module in (job, evaluate):
        monkeypatch.setattr(module, "SHARD", 3)
    made, sample = [], sampling.sample

    def counted(*args, first, **kwargs):
        made.append(first)
        if len(made) == 4:
            raise KeyboardInterrupt
        return sample(*args, first=first, **kwargs)

    monkeypatch.setattr(sampling, "sample", counted)
    for stage in ("reference", "baseline"):
        stages.make(getattr(recipes, stage)(apart), apart)
    with pytest.raises(KeyboardInterrupt):
        stages.make(recipes.images(apart, arm), apart)
    path = stages.make(recipes.images(apart, arm), apart).path
    assert made == [0, 0, 3, 3, 3, 3, 6, 6]  # of two streams
    files = evaluate.shards(path, 8)
    assert [len(load_file(file)["seed1"]) for file in files] == [3, 3, 2]
    assert set(path.glob("*.safetensors")) == set(files)
    scores.append(record(stages.make(recipes.metrics(apart, arm), apart), "metrics"))
    assert (scores[1]["n"] == 8).all()
    assert scores[1]["fid"].to_list() == pytest.approx(scores[0]["fid"].to_list(), rel=0.1)


def test_an_experiment_of_every_arm_from_stages_to_tables(experiment, forbid):
    names = [name for name in ARMS if name != "reweighted"]
    names += ["soup@0", "deme_merged@0"]
    p = experiment(seeds=[0, 1], arms=[*names, "reweighted"], loss_weighting="uncertainty")
    folder = collect.collect(p)
    for seed in p.seeds:
        here = folder / "records" / f"seed-{seed}"
        arms = pd.read_csv(here / "arms.csv").set_index("arm")
        assert list(arms.index) == [*names, "reweighted"]
        assert arms.loc["averaged", "calls_per_image"] == 2 * p.sampling_steps
        assert arms.loc["deme_routed", "calls_per_image"] == p.sampling_steps
        ratio = arms.loc["deme_routed", "parameters"] / arms.loc["deme_merged", "parameters"]
        assert ratio == 2
        trained = arms.drop("pretrained")["training_steps"]
        assert set(trained) == {2 * p.finetune_steps}
        metrics_ = pd.read_csv(here / "metrics.csv")
        assert (metrics_.groupby("arm")["seed"].apply(list).map(len) == 2).all()
        assert np.isfinite(metrics_[["fid", "fid_second", "inception_score", "kid"]]).all(axis=None)
        gate = pd.read_csv(here / "gate.csv")
        assert set(gate["model"]) == {"pretrained", "all_plain", "plain_routed", "deme_routed"}
        assert (gate.loc[gate["model"] == "all_plain", "difference"] == 0).all()
        assert set(pd.read_csv(here / "floor.csv")["extrapolated"]) == {0}
    search = pd.read_csv(folder / "records" / "seed-0" / "search.csv")
    assert (search.groupby("search")["chosen"].sum() == 1).all()
    forbid()  # records that are there are kept, whatever became of the store
    render.render(collect.collect(p))
    assert len(tables.table(read(folder / "records"))) >= len(p.arms)
    assert (folder / "table.md").is_file() and (folder / "comparisons.csv").is_file()


def test_averaged_checkpoints_are_those_along_the_run(experiment):
    p = experiment()
    (recipe,) = recipes.finetuned(p, "all_plain")
    made = stages.make(recipe, p)
    path = made.path
    last, final = load_unet(path / "checkpoint-2"), load_unet(path / "unet")
    assert all(
        torch.equal(a, b) for a, b in zip(last.parameters(), final.parameters(), strict=True)
    )
    first = load_unet(path / "checkpoint-1")
    assert any(
        not torch.equal(a, b) for a, b in zip(first.parameters(), final.parameters(), strict=True)
    )
    assert list(record(made, "history")["step"]) == [0, 2, 4, 6, 8, 10, 12, 14, 16]
    assert (path / "ema-0").is_dir()


# a pretrained model


def test_a_pretrained_folder_is_used_instead_of_training(experiment, forbid, tiny_unet, tmp_path):
    unet = tiny_unet()
    DDPMPipeline(unet, DDPMScheduler(1000)).save_pretrained(tmp_path / "model")
    p = experiment(pretrained=str(tmp_path / "model"), consistency_weight=0.0)
    forbid("train_baseline")
    expert = stages.make(recipes.finetuned(p, "deme")[0], p)
    baseline = Store(p.runs_dir).load(recipes.baseline(p))
    loaded = load_pipeline(baseline.path / "pipeline").unet.state_dict()
    assert all(torch.equal(loaded[name], w) for name, w in unet.state_dict().items())
    trained = load_unet(expert.path / "unet").state_dict()
    assert set(loaded) < set(trained)  # projections were added
    assert any(not torch.equal(trained[name], w) for name, w in loaded.items())


def test_a_shipped_model_comes_with_its_history_and_snapshots(tmp_path):
    p = parameters.load("params/fashion8.yaml", runs_dir=str(tmp_path), seeds=[0])
    path = stages.make(recipes.baseline(p), p).path
    history = pd.read_csv(path / "history.csv")
    assert history["step"].iloc[-1] == 16_000 and (path / "snapshot-4").is_dir()
    last = history.iloc[-1]
    assert abs(last["held_out_loss"] / last["train_loss"] - 1) < 0.03  # limited by capacity


def test_a_searched_merge_records_what_it_tried(experiment):
    p = experiment(merge_weights="search")
    made = stages.make(recipes.search(p, "merge"), p)
    found = record(made, "search")
    assert found["fid"].notna().sum() == p.search_candidates
    assert made.results["images"] == p.search_candidates * p.search_samples * p.search_streams
    chosen = found[found["chosen"] == 1]
    assert json.loads(chosen["weights"].iloc[0]) == made.results["weights"]
    arm = stages.make(recipes.images(p, arm_of("deme_merged")), p)
    assert arm.results["weights"] == made.results["weights"]
