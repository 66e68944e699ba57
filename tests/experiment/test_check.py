"""The check: finds what would stop a run, and leaves everything as it was."""

import hashlib
from types import SimpleNamespace

import pytest
import yaml

from deme_lib import ROOT
from deme_lib.__main__ import main
from deme_lib.experiment import check, parameters, recipes, stages, sweeps
from deme_lib.experiment.store import CHECKPOINT, HISTORY, Store


@pytest.fixture
def preset(tmp_path):
    """A function: a file of the smoke preset with changes and a runs folder of its own."""

    def write(**changes):
        smoke = yaml.safe_load((ROOT / "params" / "smoke.yaml").read_text())
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(smoke | {"runs_dir": str(tmp_path / "runs")} | changes))
        return path

    return write


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


def test_every_problem_has_a_remedy_and_is_an_exit_code(preset, tmp_path, monkeypatch, capsys):
    """On a machine without network, room or GPU."""
    path = preset(
        dataset="nobody/images", pretrained="nobody/model", features="inception", device="cuda"
    )
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(check.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    monkeypatch.setattr(check.urllib.request, "urlopen", lambda *_, **__: 1 / 0)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    found = problems(path)
    assert "set device to auto or cpu" in found["device"]
    assert "free some disk space" in found["disk"]
    for about, name in (("dataset", "nobody/images"), ("pretrained", "nobody/model")):
        assert name in found[about] and "did not answer" in found[about]
        assert f"local copy in {about}" in found[about]
    assert "local copy in inception_weights" in found["features"]
    assert main(["check", "-f", str(path)]) == 1
    assert "problem device" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "about", "words"),
    [
        ({"runs_dir": "params/smoke.yaml/runs"}, "disk", "set runs_dir"),
        ({"dataset": "runs-of-mine/images/raw"}, "dataset", "no folder runs-of-mine/images/raw"),
        ({"dataset": "params/images"}, "dataset", "no folder params/images"),
        ({"pretrained": "params/model"}, "pretrained", "no folder params/model"),
        ({"pretrained": "params"}, "pretrained", "params"),
        ({"train_images": 10**6}, "dataset", "lower train_images"),
        ({"split_seed": 1}, "features", "not on this split: set features to inception"),
        ({"features": "inception", "inception_weights": "nowhere"}, "features", "nowhere"),
    ],
    ids=str,
)
def test_a_problem_is_seen_before_anything_runs(preset, changes, about, words):
    assert words in problems(preset(**changes))[about]


def test_the_four_files_of_fashion_mnist_are_read(preset, idx_folder):
    folder = idx_folder()
    sizes = {"train_images": 20, "search_images": 6, "test_images": 6, "kid_subset_size": 6}
    path = preset(dataset=str(folder), **sizes)
    assert "dataset" not in problems(path)
    check._split.cache_clear()
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    assert "t10k-labels" in problems(path)["dataset"]


def test_damage_is_named_and_left_as_it_is(preset, tmp_path):
    path = preset()
    p = parameters.load(path).per_seed()[0]
    store, data, baseline = Store(p.runs_dir), recipes.data(p), recipes.baseline(p)
    images = stages.make(data, p).path / "images.safetensors"
    working = store.partial(baseline)
    (working / CHECKPOINT).parent.mkdir(parents=True)
    assert "artefacts" not in problems(path)
    for damaged, content in ((working / HISTORY, "[{"), (working / CHECKPOINT, "cut")):
        damaged.write_text(content)
        before = snapshot(store.root)
        assert str(damaged) in problems(path)["artefacts"]
        assert "delete" in problems(path)["artefacts"]
        assert snapshot(store.root) == before
        damaged.unlink()
    images.write_bytes(b"cut")
    assert "images.safetensors" in problems(path)["artefacts"]
