"""All notebooks through papermill on the smoke preset, and what they must hold."""

import ast
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Image
from papermill import execute_notebook
from papermill.exceptions import PapermillExecutionError
from papermill.inspection import inspect_notebook

from deme_lib import ROOT
from deme_lib.diffusion.cuts import training_ranges
from deme_lib.diffusion.models import (
    load_pipeline,
    new_scheduler,
    new_unet,
    save_pipeline,
    shape_of,
)
from deme_lib.diffusion.training import TrainingSpec
from deme_lib.experiment import parameters, recipes
from deme_lib.experiment.schema import Parameters
from deme_lib.experiment.stages import train
from deme_lib.experiment.stages.job import Job

FIELDS = Parameters.model_fields
NOTEBOOKS = sorted((ROOT / "notebooks").glob("0*.ipynb"))


def cells(path):
    return nbformat.read(path, as_version=4).cells


def declaration(path) -> str:
    return next(c.source for c in cells(path) if "parameters" in c.metadata.get("tags", []))


def declared(path) -> dict:
    statements = ast.parse(declaration(path)).body
    return {s.target.id: ast.literal_eval(s.value) for s in statements}


def run(path, out, runs, preset="smoke", **overrides):
    values = yaml.safe_load((ROOT / "params" / f"{preset}.yaml").read_text())
    values |= {"runs_dir": str(runs), "figures_dir": str(runs / "figures"), **overrides}
    return execute_notebook(path, out, values, progress_bar=False)


def outputs(executed):
    return [output for cell in executed.cells for output in cell.get("outputs", [])]


def test_all_six_run_one_after_another(tmp_path):
    assert len(NOTEBOOKS) == 6
    runs = tmp_path / "runs"
    executed = {path.name[:2]: run(path, tmp_path / path.name, runs) for path in NOTEBOOKS}
    for output in [output for notebook in executed.values() for output in outputs(notebook)]:
        assert output.output_type != "error"
        assert "Warning" not in output.get("text", "")
        assert "widget" not in json.dumps(output.get("data", {})), "a stored widget freezes"
    (folder,) = (runs / "figures").iterdir()
    assert folder.name == "smoke", "another runs_dir or figures_dir changes no result"
    for name in ("table.md", "table.tex", "comparisons.csv", "main.png", "records/seed-1/run.json"):
        assert (folder / name).is_file()
    shown = (o.get("data", {}).get("text/plain", "") for o in outputs(executed["02"]))
    table = next(text for text in shown if "library" in text).splitlines()[2:]
    steps = np.array([line.split()[1:] for line in table], float)  # Eq. 2, Eq. 4, Eq. 5, library
    assert np.allclose(steps[:, 2], steps[:, 3], rtol=1e-4)
    assert steps[0, 1] < 1e-9, "the first step's student is its teacher"
    merged = next(o.text for o in outputs(executed["03"]) if "merge by hand" in o.get("text", ""))
    assert float(merged.split(":")[1]) < 1e-6


def test_02_trains_by_hand_what_the_stage_trains():
    """The specification in sight is the one that the first expert's recipe leads to."""
    q = parameters.load("params/smoke.yaml").per_seed()[0]
    pipeline = SimpleNamespace(scheduler=new_scheduler(q.num_train_timesteps))
    recipe = recipes.finetuned(q, "deme")[0]
    names = {"q": q, "pipeline": pipeline, "recipes": recipes, "TrainingSpec": TrainingSpec}
    names |= {"training_ranges": training_ranges}
    exec(next(c.source for c in cells(NOTEBOOKS[1]) if "spec = TrainingSpec" in c.source), names)
    job = Job(recipe.parameters, {}, {}, Path(), recipe.label, torch.device("cpu"), 1, 1)
    ranges = training_ranges(job["range_cut"], job["n_ranges"], pipeline.scheduler)
    stage = train._spec(job, job["steps"], ranges[job["range_index"]], job["finetune_lr"])
    assert replace(stage, further_ema_decays=()) == names["spec"]


def test_a_notebook_stands_alone(tmp_path, preset):
    """Any notebook first, in an empty store, by papermill's command line from another folder."""
    notebook, out = ROOT / "notebooks" / "03_merge.ipynb", tmp_path / "out.ipynb"
    papermill(tmp_path, str(notebook), str(out), "-f", str(preset(experiment="mine")))
    text = out.read_text()
    assert "made now: baseline" in text
    assert "deme-1of2, deme-2of2 (20 optimiser steps" in text


def test_a_wrong_parameter_stops_at_once(tmp_path):
    """Under bare papermill too; it stops every notebook by the same call."""
    notebook, out = str(ROOT / "notebooks" / "03_merge.ipynb"), str(tmp_path / "out.ipynb")
    failed = papermill(tmp_path, notebook, out, "-p", "n_range", "3", fails=True)
    assert "did you mean 'n_ranges'" in failed.stderr
    assert not (tmp_path / "runs").exists()


def test_cifar_offline_says_what_to_fetch(tmp_path):
    with pytest.raises(PapermillExecutionError, match="uoft-cs/cifar10") as caught:
        merge_on_cpu(tmp_path, preset="cifar")
    assert "parameter `dataset`" in str(caught.value)


def test_the_true_cifar_path_on_local_files(tmp_path, inception_weights):
    """params/cifar.yaml but for sizes, on a tiny pipeline and data in CIFAR-10's schema."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 20), ("test", 12)):
        images = list(rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8))
        features = Features({"img": Image(), "label": ClassLabel(num_classes=2)})
        columns = {"img": images, "label": [i % 2 for i in range(count)]}
        (tmp_path / "data").mkdir(exist_ok=True)
        Dataset.from_dict(columns, features).to_parquet(tmp_path / "data" / f"{part}-0.parquet")
    save_pipeline(new_unet((3, 8, 8), [8, 8], 1, seed=0), new_scheduler(1000), tmp_path / "model")
    sizes = {"search_samples": 4, "search_candidates": 5, "search_losses": 4, "search_streams": 2}
    executed, pipeline = merge_on_cpu(
        tmp_path,
        preset="cifar",
        dataset=str(tmp_path / "data"),
        pretrained=str(tmp_path / "model"),
        inception_weights=inception_weights,
        **sizes,
    )
    assert pipeline.unet.config.in_channels == 3
    assert "search-merge" in json.dumps(executed)


def test_fashion_from_its_four_files(tmp_path, idx_folder, inception_weights):
    """params/fashion.yaml but for sizes and bf16: idx files, padding, attention, from scratch."""
    _, pipeline = merge_on_cpu(
        tmp_path,
        preset="fashion",
        dataset=str(idx_folder()),
        precision="no",
        features="inception",
        second_features="",
        inception_weights=inception_weights,
        model_channels=[8, 16],
        pretrain_steps=4,
    )
    unet = pipeline.unet
    assert shape_of(unet) == (1, 32, 32)
    ends = unet.config.down_block_types[-1], unet.config.up_block_types[0]
    assert ends == ("AttnDownBlock2D", "AttnUpBlock2D") and unet.mid_block.attentions[0]


def merge_on_cpu(tmp_path, **overrides):
    """The executed 03_merge of a large preset cut to size, and the pipeline that it made."""
    here = {"batch_size": 4, "device": "cpu", "threads": 1, "train_images": 16, "samples": 4}
    here |= {"search_images": 5, "test_images": 5, "loss_images": 5, "acceptance_samples": 8}
    here |= {"kid_subset_size": 4, "is_splits": 2, "sampling_steps": 2, "plane_points": 2}
    here |= {"finetune_steps": 8, "ema_decay": 0.5, "further_ema_decays": []}
    notebook, runs = ROOT / "notebooks" / "03_merge.ipynb", tmp_path / "runs"
    executed = run(notebook, tmp_path / "out.ipynb", runs, **here, **overrides)
    return executed, load_pipeline(next((runs / "store").glob("merged-*")) / "pipeline")


def papermill(folder: Path, *arguments: str, fails: bool = False):
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert (done.returncode != 0) == fails, done.stderr
    return done


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_declared_parameters_are_the_schemas(path):
    """Defaults, types and meanings; `papermill --help-notebook` sees those of one line."""
    for name, value in declared(path).items():
        assert value == FIELDS[name].default, name
        assert type(value) is type(FIELDS[name].default), name
        assert f"  # {FIELDS[name].description}" in declaration(path)
    for name, info in inspect_notebook(str(path)).items():
        assert info["help"] in (FIELDS[name].description, ""), name


def test_every_parameter_is_declared_somewhere():
    assert set().union(*map(declared, NOTEBOOKS)) == set(FIELDS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_short_told_in_prose_and_committed_clean(path):
    notebook = json.loads(path.read_text())
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert "widgets" not in notebook["metadata"]
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(code) <= 12
    assert all(len(cell["source"]) <= 40 for cell in code)
    assert notebook["cells"][0]["cell_type"] == notebook["cells"][-1]["cell_type"] == "markdown"
    for cell in code:
        assert not cell["outputs"]
        assert cell["execution_count"] is None
