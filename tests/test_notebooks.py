"""All notebooks through papermill on the smoke preset, and what they must hold."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import yaml
from datasets import ClassLabel, Dataset, Features, Image
from papermill import execute_notebook
from papermill.exceptions import PapermillExecutionError
from papermill.inspection import inspect_notebook

from deme_lib import ROOT
from deme_lib.diffusion.models import load_pipeline, new_scheduler, new_unet, save_pipeline
from deme_lib.experiment.parameters import DEFAULTS, EXECUTION, Parameters

NOTEBOOKS = sorted((ROOT / "notebooks").glob("0*.ipynb"))


def parameters_cell(path):
    cells = nbformat.read(path, as_version=4).cells
    return next(c.source for c in cells if "parameters" in c.metadata.get("tags", []))


def declared(path) -> dict:
    statements = ast.parse(parameters_cell(path)).body
    return {s.target.id: ast.literal_eval(s.value) for s in statements}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A runs folder that the notebooks of this module share, as a user's would."""
    return tmp_path_factory.mktemp("runs")


def run(path, out, runs, preset="smoke", **overrides):
    values = yaml.safe_load((ROOT / "params" / f"{preset}.yaml").read_text())
    return execute_notebook(
        path, out, {**values, "runs_dir": str(runs), **overrides}, progress_bar=False
    )


def test_all_six_run_one_after_another(runs, tmp_path):
    assert len(NOTEBOOKS) == 6
    for path in NOTEBOOKS:
        executed = run(path, tmp_path / path.name, runs)
        for cell in executed.cells:
            for output in cell.get("outputs", []):
                assert output.output_type != "error"
                assert "Warning" not in output.get("text", "")
    folder = next((runs / "figures").iterdir())
    assert folder.name.startswith("smoke-"), "another runs_dir is not the preset"
    for name in ("ablation1.md", "ablation2.tex", "paired.csv", "main.png", "records/metrics.csv"):
        assert (folder / name).is_file()


def test_a_notebook_stands_alone(tmp_path):
    """Any notebook first, in an empty store, by papermill's command line from another folder."""
    values = yaml.safe_load((ROOT / "params" / "smoke.yaml").read_text())
    preset = tmp_path / "mine.yaml"
    preset.write_text(yaml.safe_dump({**values, "runs_dir": str(tmp_path), "experiment": "mine"}))
    notebook, out = ROOT / "notebooks" / "03_merge.ipynb", tmp_path / "out.ipynb"
    papermill(tmp_path, str(notebook), str(out), "-f", str(preset))
    text = out.read_text()
    assert "so made now: baseline" in text
    assert "optimiser steps of" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-p", "n_range", "3"], "did you mean 'n_ranges'"),
        (["-p", "finetune_lr", "fast"], "finetune_lr='fast'"),
        (["-p", "merge_weights", "[0.5]"], "1 weights for n_ranges=4"),
    ],
)
def test_a_wrong_parameter_stops_at_once(options, message, tmp_path):
    out = tmp_path / "out.ipynb"
    notebook = str(ROOT / "notebooks" / "03_merge.ipynb")
    failed = papermill(tmp_path, notebook, str(out), *options, fails=True)
    assert message in failed.stderr
    assert not (tmp_path / "runs").exists()


def test_cifar_offline_says_what_to_fetch(tmp_path):
    with pytest.raises(PapermillExecutionError, match="uoft-cs/cifar10") as caught:
        run(ROOT / "notebooks/03_merge.ipynb", tmp_path / "out.ipynb", tmp_path, preset="cifar")
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
    sizes = {"train_images": 16, "search_images": 5, "test_images": 5, "samples": 4}
    sizes |= {"search_samples": 4, "search_candidates": 5, "search_losses": 4, "plane_points": 2}
    sizes |= {"acceptance_samples": 8, "kid_subset_size": 4, "is_splits": 2, "sampling_steps": 2}
    executed, pipeline = merge_on_cpu(
        tmp_path,
        preset="cifar",
        dataset=str(tmp_path / "data"),
        pretrained=str(tmp_path / "model"),
        inception_weights=inception_weights,
        finetune_steps=8,
        ema_decay=0.5,
        **sizes,
    )
    assert pipeline.unet.config.in_channels == 3
    assert "5 scored by images" in json.dumps(executed)


def test_fashion_from_its_four_files(tmp_path, idx_folder, inception_weights):
    """params/fashion.yaml but for sizes: idx files, padding, attention, bf16, from scratch."""
    sizes = {"train_images": 20, "search_images": 5, "test_images": 6, "samples": 4}
    sizes |= {"kid_subset_size": 4, "is_splits": 2, "sampling_steps": 2, "plane_points": 2}
    _, pipeline = merge_on_cpu(
        tmp_path,
        preset="fashion",
        dataset=str(idx_folder()),
        merge_weights="uniform",
        features="inception",
        second_features="",
        inception_weights=inception_weights,
        model_channels=[8, 16],
        pretrain_steps=4,
        finetune_steps=4,
        ema_decay=0.0,
        **sizes,
    )
    unet = pipeline.unet
    assert (unet.config.in_channels, unet.config.sample_size) == (1, 32)
    assert unet.config.down_block_types[-1] == "AttnDownBlock2D"


def merge_on_cpu(tmp_path, **overrides):
    """The executed 03_merge of a large preset cut to size, and the pipeline that it made."""
    here = {"batch_size": 4, "device": "cpu", "threads": 1}
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
def test_declared_parameters_equal_the_defaults(path):
    defaults = yaml.safe_load(DEFAULTS.read_text())
    for name, value in declared(path).items():
        assert value == defaults[name], name
        assert type(value) is type(defaults[name]), name
    shown = {name: info["help"] for name, info in inspect_notebook(str(path)).items()}
    assert shown == {name: Parameters.model_fields[name].description for name in declared(path)}


def test_every_parameter_is_declared_somewhere_and_by_default():
    everywhere = set().union(*(declared(path) for path in NOTEBOOKS))
    assert everywhere == set(Parameters.model_fields)
    assert set(yaml.safe_load(DEFAULTS.read_text())) == set(Parameters.model_fields)
    assert set(Parameters.model_fields) >= EXECUTION


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_committed_clean(path):
    notebook = json.loads(path.read_text())
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert "widgets" not in notebook["metadata"]
    for cell in notebook["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
