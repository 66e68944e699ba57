"""The check: finds what would stop a run, and leaves everything as it was."""

import hashlib
from types import SimpleNamespace

import pytest

from deme_lib.__main__ import main
from deme_lib.experiment import check, parameters, recipes, stages, sweeps


def problems(path):
    """What the check objects to, by what it is about."""
    return {about: found for about, problem, found in check.examine(sweeps.plan(path)) if problem}


def snapshot(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: hashlib.sha256(path.read_bytes()).digest() for path in files}


def test_a_healthy_experiment_has_no_problem_and_is_left_alone(preset, tmp_path, capsys):
    path = preset()
    assert main(["check", "-f", str(path)]) == 0
    assert "problem" not in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [path]


def test_every_problem_has_a_remedy_and_is_an_exit_code(preset, monkeypatch, capsys):
    """On a machine without room or GPU; what is on a hub is left to the first job."""
    path = preset(dataset="nobody/images", pretrained="nobody/model", device="cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(check.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    found = problems(path)
    assert found.keys() == {"device", "disk"}
    assert "set device to auto or cpu" in found["device"]
    assert "free some disk space" in found["disk"]
    assert main(["check", "-f", str(path)]) == 1
    assert "problem device" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "about", "words"),
    [
        ({"runs_dir": "params/smoke.yaml/runs"}, "disk", "set runs_dir"),
        ({"dataset": "runs-of-mine/images/raw"}, "dataset", "no folder runs-of-mine/images/raw"),
        ({"pretrained": "params/model"}, "pretrained", "no folder params/model"),
        ({"train_images": 10**6}, "dataset", "lower train_images"),
        ({"model_channels": [8] * 5}, "pretrained", "give fewer model_channels"),
        ({"processes": 9, "batch_size": 8, "device": "cpu"}, "device", "above batch_size=8"),
        ({"split_seed": 1}, "features", "not on this split: set features to inception"),
        ({"features": "inception", "inception_weights": "nowhere"}, "features", "nowhere"),
    ],
    ids=str,
)
def test_a_problem_is_seen_before_anything_runs(preset, changes, about, words):
    assert words in problems(preset(**changes))[about]


def test_damage_is_named_and_left_as_it_is(preset, tmp_path):
    path = preset()
    p = parameters.load(path).per_seed()[0]
    images = stages.make(recipes.data(p), p).path / "images.safetensors"
    assert "artefacts" not in problems(path)
    images.write_bytes(b"cut")
    before = snapshot(tmp_path)
    assert "images.safetensors" in problems(path)["artefacts"]
    assert snapshot(tmp_path) == before
