"""The doctor: finds what would stop a run, and leaves everything as it was."""

import hashlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from filelock import FileLock
from test_stages import TINY

from deme_lib.__main__ import main
from deme_lib.diffusion import data
from deme_lib.experiment import doctor, parameters, recipes, stages, sweeps
from deme_lib.experiment.store import CHECKPOINT, Store


@pytest.fixture
def experiment(tmp_path):
    """A function: the tiny experiment with a runs folder of its own."""
    return lambda **changes: parameters.load(
        "params/smoke.yaml", **TINY | {"runs_dir": str(tmp_path / "runs")} | changes
    )


def plan_of(p):
    """What ``sweeps.plan`` makes of a preset."""
    return {r.name: (r, q) for q in p.per_seed() for r in recipes.everything(q).values()}


def findings(p, about):
    plan = p if isinstance(p, dict) else plan_of(p)
    return [f for f in doctor.examine(plan) if f.about == about]


def only(p, about):
    (found,) = findings(p, about)
    return found


def snapshot(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: hashlib.sha256(path.read_bytes()).digest() for path in files}


def test_a_healthy_experiment_has_no_problem_and_is_left_alone(experiment, tmp_path):
    p = experiment()
    found = list(doctor.examine(plan_of(p)))
    assert {f.about for f in found} == set(doctor.CHECKS)
    assert not [f for f in found if f.status == doctor.PROBLEM]
    assert list(tmp_path.iterdir()) == []


def test_every_problem_has_a_remedy(experiment, tmp_path, monkeypatch):
    """On a machine without network, room, memory, GPU or the right packages."""
    p = experiment(
        dataset="nobody/images", pretrained="nobody/model", features="inception", device="cuda"
    )
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "0.0.1")
    monkeypatch.setattr(doctor, "LEAST_MEMORY_MIB", 1 << 30)
    monkeypatch.setattr(doctor.urllib.request, "urlopen", lambda *_, **__: 1 / 0)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    found = {f.about: f for f in doctor.examine(plan_of(p)) if f.status != doctor.OK and f.about}
    assert found["packages"].status == "problem" and "torch is 0.0.1" in found["packages"].found
    assert "set device to auto or cpu" in found["device"].found
    assert found["memory"].status == "warning" and "CORES=1" in found["memory"].remedy
    for about, name in (("dataset", "nobody/images"), ("pretrained", "nobody/model")):
        assert name in found[about].found and "did not answer" in found[about].found
        assert f"local copy in {about}" in found[about].remedy
    assert found["features"].remedy


def test_room_is_asked_for(experiment, monkeypatch):
    p = experiment()
    for free, status in ((10**12, "ok"), (0, "problem")):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _, usage=usage: usage)
        assert only(p, "disk").status == status


def test_a_runs_folder_below_a_file_is_a_problem(experiment, tmp_path):
    (tmp_path / "file").touch()
    found = only(experiment(runs_dir=str(tmp_path / "file" / "runs")), "disk")
    assert found.status == "problem" and "set runs_dir" in found.remedy


@pytest.mark.parametrize("change", [{"split_seed": 1}, {"train_images": 1100}])
def test_classifiers_of_another_split_are_a_problem(experiment, change):
    statuses = {f.status for f in findings(experiment(**change), "features")}
    assert statuses == {"problem"}


def test_the_four_files_of_fashion_mnist_are_known(experiment, idx_folder):
    folder = idx_folder()
    found = only(experiment(dataset=str(folder)), "dataset")
    assert found.status == "ok" and "20 train and 12 test images" in found.found
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    found = only(experiment(dataset=str(folder)), "dataset")
    assert found.status == "problem" and "t10k-labels" in found.found and "copy" in found.remedy


def test_a_store_is_read_and_its_damage_named(experiment, capsys, tmp_path):
    p = experiment()
    store, recipe = Store(p.runs_dir), recipes.data(p)
    path = stages.make(recipe, p).path
    assert "1 of" in only(p, "artefacts").found
    assert only(p, "locks").status == "ok"  # the file of a lock that nobody holds

    with FileLock(store.root / ".locks" / f"{recipe.name}.lock"):
        assert recipe.name in only(p, "locks").found

    (store.root / ".partial" / recipes.baseline(p).name).mkdir(parents=True)
    (store.root / ".partial" / "baseline-0123").mkdir()
    ours, foreign = findings(p, "interrupted")
    assert ours.status == "ok" and recipes.baseline(p).name in ours.found
    assert foreign.status == "warning" and "baseline-0123" in foreign.found

    (path / CHECKPOINT).write_text("a kill came between the rename and its removal")
    for lock in store.root.glob(".locks/*"):
        lock.chmod(0o400)
    before = snapshot(store.root)
    assert not [f for f in doctor.examine(plan_of(p)) if f.status == doctor.PROBLEM]
    assert snapshot(store.root) == before

    (path / "images.safetensors").write_bytes(b"cut")
    before = snapshot(store.root)
    damaged, _ = findings(p, "artefacts")
    assert damaged.status == "problem"
    assert str(path / "images.safetensors") in damaged.found and "delete" in damaged.found
    assert snapshot(store.root) == before


def test_every_training_seed_is_seen(experiment):
    p = experiment(seeds=[0, 1])
    store, second = Store(p.runs_dir), p.per_seed()[1]
    names = {recipes.baseline(q).name for q in p.per_seed()}
    for name in names:
        (store.root / ".partial" / name).mkdir(parents=True)
    found = only(p, "interrupted")
    assert found.status == "ok" and all(name in found.found for name in names)
    stages.make(recipes.data(second), second)
    both = {r.name for q in p.per_seed() for r in recipes.everything(q).values()}
    assert only(p, "artefacts").found == f"1 of {len(both)} stored and whole"


def test_every_cell_of_a_sweep_is_seen(experiment, tmp_path, capsys):
    values = {**yaml.safe_load(Path("params/smoke.yaml").read_text()), **TINY}
    base = values | {"runs_dir": str(tmp_path / "runs")}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    sweep = {"sweep": "tried", "title": "t", "axis": "a", "base": str(tmp_path / "base.yaml")}
    sweep |= {"arms": ["merged"], "beside": ["pretrained"], "against": ["pretrained"]}
    cells = [{"cell": n, "set": {"probability": float(n)}} for n in ("0.1", "0.7")]
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({**sweep, "cells": cells}))
    plan = sweeps.plan(tmp_path / "sweep.yaml")
    experts = [name for name in plan if name.startswith("expert-1of")]
    assert len(experts) == 2
    for name in experts:
        (tmp_path / "runs" / "store" / ".partial" / name).mkdir(parents=True)
    found = only(plan, "interrupted")
    assert found.status == "ok" and all(name in found.found for name in experts)
    main(["check", "-f", str(tmp_path / "sweep.yaml")])
    said = capsys.readouterr().out
    assert all(name in said for name in experts)
    assert f"0 of {len(plan)} stored" in said


@pytest.mark.parametrize("change", [{"image_size": 32}, {"attention": True}])
def test_the_need_knows_the_size_and_the_attention(experiment, change):
    def need(p):
        return doctor._bytes_needed(Store(p.runs_dir), plan_of(p))

    assert need(experiment(**change)) > need(experiment())


def test_a_need_in_colour_is_counted_before_the_data_is_here(experiment):
    p = experiment(dataset="nobody/images", image_size=16)
    assert doctor._shape(p, Store(p.runs_dir)) == (3, 16, 16)


def test_a_classifier_fits_by_evidence(experiment, idx_folder, monkeypatch):
    """The digits and stored data are compared by their images; other data cannot be, yet."""
    assert {f.found for f in findings(experiment(), "features")} >= {"digits-a fits the data"}
    assert findings(experiment(image_size=10), "features")[0].status == "problem"
    p = experiment(dataset=str(idx_folder()), train_images=16, search_images=5, test_images=6)
    images = data.split(p.dataset, 16, 5, 6, p.split_seed)["train"].images
    card = {"dataset": "digits", "train_images": 16, "split_seed": 0, "train_hash": "other"}
    monkeypatch.setattr(doctor.classifier, "card_of", lambda name: card)
    before = findings(p, "features")[0]
    assert before.status == "warning" and "once the data is here" in before.found
    stages.make(recipes.data(p), p)
    assert findings(p, "features")[0].status == "problem"
    card["train_hash"] = data.content_hash(images)
    assert findings(p, "features")[0].status == "ok"


def test_a_check_that_fails_itself_is_a_problem(experiment, monkeypatch):
    monkeypatch.setitem(doctor.CHECKS, "device", lambda p: 1 / 0)
    assert only(experiment(), "device").status == "problem"


def test_the_exit_code_says_whether_a_run_would_stop(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "CHECKS", {"device": lambda p: [("ok", "cpu")]})
    assert main(["check"]) == 0
    monkeypatch.setattr(doctor, "CHECKS", {"device": lambda p: [("problem", "no", "buy one")]})
    assert main(["check"]) == 1
    assert "problem  device       no -> buy one" in capsys.readouterr().out
