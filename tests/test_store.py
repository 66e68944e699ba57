"""Artefacts: whole or absent, made once, checked when loaded."""

import dataclasses
import json
import subprocess
import sys
import time

import pytest

from deme_lib.store import Recipe, Store, StoreError

DATA = Recipe("data", "data", {"seed": 0}, {})
EXPERT = Recipe("expert", "expert-2of4", {"lr": 0.1, "steps": 10}, {"data": DATA})


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


class Builder:
    """Writes two files; counts how often it was asked."""

    def __init__(self):
        self.builds = 0

    def __call__(self, folder):
        self.builds += 1
        (folder / "deep").mkdir(exist_ok=True)
        (folder / "deep" / "weights.bin").write_bytes(bytes(range(100)))
        (folder / "notes.txt").write_text("whole")
        return {"loss": 0.5}


def same(recipe, **changes):
    return dataclasses.replace(recipe, **changes)


# keys


def test_the_key_knows_everything_that_changes_results():
    others = [
        same(EXPERT, stage="other"),
        same(EXPERT, version=2),
        same(EXPERT, parameters={"lr": 0.2, "steps": 10}),
        same(EXPERT, parameters={"lr": 0.1, "steps": 10, "more": 0}),
        same(EXPERT, inputs={}),
        same(EXPERT, inputs={"images": DATA}),
        same(EXPERT, inputs={"data": same(DATA, parameters={"seed": 1})}),
        same(EXPERT, inputs={"data": same(DATA, version=2)}),
    ]
    keys = {recipe.key for recipe in [EXPERT, *others]}
    assert len(keys) == len(others) + 1


def test_the_key_knows_nothing_else():
    assert same(EXPERT, training_steps=5, denoiser_calls=7, label="x").key == EXPERT.key
    assert same(EXPERT, parameters={"steps": 10, "lr": 0.1}).key == EXPERT.key
    assert EXPERT.name == f"expert-2of4-{EXPERT.key}"


# making and loading


def test_an_artefact_is_made_once(store):
    build = Builder()
    assert not store.holds(EXPERT)
    made = store.make(EXPERT, build)
    assert store.holds(EXPERT)
    again = store.make(EXPERT, build)
    assert build.builds == 1
    assert again == made == store.load(EXPERT)
    assert made.results == {"loss": 0.5}
    assert set(made.record["files"]) == {"deep/weights.bin", "notes.txt"}
    assert made.record["parameters"] == EXPERT.parameters
    assert made.record["inputs"] == {"data": DATA.name}


def test_what_make_returns_is_what_load_returns(store):
    """Also where results are not what JSON gives back: tuples, integer keys."""
    made = store.make(EXPERT, lambda folder: {"pair": (1, 2), "by_range": {0: 0.5}})
    assert made == store.load(EXPERT)


def test_missing_lists_what_must_be_made_upstream_first(store):
    merged = Recipe("merged", "merged", {}, {"expert": EXPERT, "data": DATA})
    assert store.missing(merged) == [DATA, EXPERT, merged]
    store.make(DATA, Builder())
    assert store.missing(merged) == [EXPERT, merged]
    store.make(merged, Builder())
    assert store.missing(merged) == []


def test_loading_what_is_not_there(store):
    with pytest.raises(StoreError, match=rf"{EXPERT.name} is not in"):
        store.load(EXPERT)


# damage


def truncate(folder):
    path = folder / "deep" / "weights.bin"
    path.write_bytes(path.read_bytes()[:50])
    return path


def change_one_byte(folder):
    path = folder / "deep" / "weights.bin"
    path.write_bytes(b"\xff" + path.read_bytes()[1:])
    return path


def remove_file(folder):
    (folder / "notes.txt").unlink()
    return "notes.txt"


def add_file(folder):
    (folder / "foreign.txt").write_text("")
    return "foreign.txt"


def cut_record(folder):
    path = folder / "record.json"
    path.write_text(path.read_text()[:-20])
    return path


def empty_record(folder):
    (folder / "record.json").write_text("{}")
    return "record.json"


def record_of_another(folder):
    path = folder / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"key": DATA.key}))
    return DATA.key


def remove_record(folder):
    (folder / "record.json").unlink()
    return folder


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        change_one_byte,
        remove_file,
        add_file,
        cut_record,
        empty_record,
        record_of_another,
        remove_record,
    ],
    ids=lambda f: f.__name__,
)
def test_damage_is_an_error_that_names_the_file_and_the_remedy(store, damage):
    build = Builder()
    folder = store.make(EXPERT, build).path
    named = damage(folder)
    with pytest.raises(StoreError) as caught:
        store.make(EXPERT, build)
    assert str(named) in str(caught.value)
    assert str(folder) in str(caught.value) and "delete" in str(caught.value)
    assert build.builds == 1


# failure and interruption


def test_a_build_that_raises_leaves_nothing_and_harms_no_other(store):
    data = store.make(DATA, Builder())

    def fail(folder):
        (folder / "half.bin").write_bytes(b"half")
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        store.make(EXPERT, fail)
    assert not store.folder(EXPERT).exists()
    with pytest.raises(StoreError):
        store.load(EXPERT)
    assert store.load(DATA) == data


SCRIPT = """
import os, sys, time
from pathlib import Path
from deme_lib.store import Recipe, Store

root, mode = Path(sys.argv[1]), sys.argv[2]
data = Recipe("data", "data", {"seed": 0}, {})
recipe = Recipe("expert", "expert-2of4", {"lr": 0.1, "steps": 10}, {"data": data})

def build(folder):
    with open(root / "builds", "a") as log:
        log.write(mode)
    (folder / "checkpoint").write_text("step 7")
    (folder / "record.json.tmp").write_text("{")
    if mode == "die":
        os._exit(1)
    while not (root / "go").exists():
        time.sleep(0.01)
    (folder / "record.json.tmp").unlink()
    return {}

print(Store(root).make(recipe, build).path, flush=True)
"""


def start(root, mode):
    command = [sys.executable, "-c", SCRIPT, str(root), mode]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_what_a_killed_maker_left_is_finished_by_the_next(store, tmp_path):
    assert start(tmp_path, "die").wait(60) == 1
    assert not store.folder(EXPERT).exists()

    def finish(folder):
        assert (folder / "checkpoint").read_text() == "step 7"
        (folder / "checkpoint").unlink()
        (folder / "weights.bin").write_bytes(b"whole")
        return {}

    made = store.make(EXPERT, finish)
    assert list(made.record["files"]) == ["weights.bin"]
    assert store.load(EXPERT) == made


def test_two_processes_that_ask_at_once_build_once(store, tmp_path):
    first = start(tmp_path, "1")
    deadline = time.monotonic() + 60
    while not (tmp_path / "builds").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    second = start(tmp_path, "2")
    assert "another process is making it" in second.stdout.readline()
    (tmp_path / "go").touch()
    outputs = [p.communicate(timeout=60)[0].split()[-1] for p in (first, second)]
    assert first.returncode == second.returncode == 0
    assert outputs == [str(store.folder(EXPERT))] * 2
    assert (tmp_path / "builds").read_text() == "1"
    store.load(EXPERT)
