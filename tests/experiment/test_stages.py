"""Stages: made once, resumed where killed, refused early; on an experiment of seconds."""

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from safetensors.torch import load_file

from deme_lib.diffusion import sampling
from deme_lib.diffusion.models import load_pipeline, load_unet
from deme_lib.experiment import collect, parameters, recipes, stages
from deme_lib.experiment.arms import ARMS
from deme_lib.experiment.stages import evaluate, job
from deme_lib.experiment.store import Store
from deme_lib.report import render, tables
from deme_lib.report.records import read


@pytest.fixture
def experiment(tmp_path):
    """A function: the tiny experiment of one seed, ``experiment("folder", seeds=[1])``."""

    def make(runs="runs", **changes):
        return tiny.experiment(tmp_path / runs, **{"sampling_seeds": [0, 1]} | changes)

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
    search = pd.read_csv(folder / "records" / "seed-0" / "search.csv").set_index("search")
    assert (search.groupby("search")["chosen"].sum() == 1).all()
    assert search.loc["merge", "fid"].count() == p.search_candidates
    chosen = search.loc[search["chosen"] == 1, "weights"]["merge"]
    here = pd.read_csv(folder / "records" / "seed-0" / "arms.csv").set_index("arm")
    assert here.loc["merged_searched", "weights"] == chosen
    images = p.search_candidates * p.search_samples * p.search_streams
    assert here.loc["merged_searched", "search_images"] == images
    forbid()  # records that are there are kept, whatever became of the store
    render.render(collect.collect(p))
    assert len(tables.table(read(folder / "records"))) >= len(p.arms)
    assert (folder / "table.md").is_file() and (folder / "comparisons.csv").is_file()


def test_averaged_checkpoints_are_those_along_the_run(experiment):
    p = experiment()
    (recipe,) = recipes.finetuned(p, "all_plain")
    made = stages.make(recipe, p)
    path = made.path
    names = ("checkpoint-1", "checkpoint-2", "unet")
    first, last, final = (load_unet(path / name).conv_in.weight for name in names)
    assert torch.equal(last, final) and not torch.equal(first, final)
    assert list(record(made, "history")["step"]) == [0, 2, 4, 6, 8, 10, 12, 14, 16]
    assert (path / "ema-0").is_dir()


def test_a_shipped_model_comes_with_its_history_and_snapshots(tmp_path):
    p = parameters.load("params/fashion8.yaml", runs_dir=str(tmp_path), seeds=[0])
    path = stages.make(recipes.baseline(p), p).path
    history = pd.read_csv(path / "history.csv")
    assert history["step"].iloc[-1] == 16_000 and (path / "snapshot-4").is_dir()
    last = history.iloc[-1]
    assert abs(last["held_out_loss"] / last["train_loss"] - 1) < 0.03  # limited by capacity
