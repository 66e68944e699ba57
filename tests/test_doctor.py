"""The doctor: finds what would stop a run, and leaves everything as it was."""

import hashlib
from types import SimpleNamespace

import pytest
from filelock import FileLock
from test_stages import TINY

from deme_lib import doctor, parameters, recipes, stages
from deme_lib.__main__ import main
from deme_lib.store import Store


@pytest.fixture
def experiment(tmp_path):
    """A function: the tiny experiment with a runs folder of its own."""
    return lambda **changes: parameters.load(
        "params/smoke.yaml", **TINY | {"runs_dir": str(tmp_path / "runs")} | changes
    )


def findings(p, about):
    return [f for f in doctor.examine(p) if f.about == about]


def only(p, about):
    (found,) = findings(p, about)
    return found


def snapshot(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: hashlib.sha256(path.read_bytes()).digest() for path in files}


def test_a_healthy_experiment_has_no_problem_and_is_left_alone(experiment, tmp_path):
    p = experiment()
    found = list(doctor.examine(p))
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
    found = {f.about: f for f in doctor.examine(p) if f.status != doctor.OK and f.about}
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

    (path / "images.safetensors").write_bytes(b"cut")
    before = snapshot(store.root)
    damaged, _ = findings(p, "artefacts")
    assert damaged.status == "problem"
    assert str(path / "images.safetensors") in damaged.found and "delete" in damaged.found
    assert snapshot(store.root) == before


def test_a_check_that_fails_itself_is_a_problem(experiment, monkeypatch):
    monkeypatch.setitem(doctor.CHECKS, "device", lambda p: 1 / 0)
    assert only(experiment(), "device").status == "problem"


def test_the_exit_code_says_whether_a_run_would_stop(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "CHECKS", {"device": lambda p: [("ok", "cpu")]})
    assert main(["check"]) == 0
    monkeypatch.setattr(doctor, "CHECKS", {"device": lambda p: [("problem", "no", "buy one")]})
    assert main(["check"]) == 1
    assert "problem  device       no -> buy one" in capsys.readouterr().out
