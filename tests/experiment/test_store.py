"""Artefacts: whole or absent, made once, checked when loaded."""

import dataclasses
import errno
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
from safetensors import SafetensorError

from deme_lib.experiment.store import (
    CALL_S,
    CHECKPOINT,
    STEP_S,
    WORKING,
    Recipe,
    ResourceError,
    Store,
    StoreError,
    rates,
)

DATA = Recipe("data", "data", {"seed": 0}, {})
EXPERT = Recipe("expert", "expert-2of4", {"lr": 0.1, "steps": 10}, {"data": DATA})
same = dataclasses.replace


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


class Builder:
    """Writes two files; counts how often it was asked."""

    def __init__(self):
        self.builds = 0

    def __call__(self, folder):
        self.builds += 1
        (folder / "deep").mkdir()
        (folder / "deep" / "weights.bin").write_bytes(bytes(range(100)))
        (folder / "notes.txt").write_text("whole")
        return {"loss": 0.5}


# keys


def test_the_key_knows_what_changes_results_and_nothing_else():
    others = [
        same(EXPERT, stage="other"),
        same(EXPERT, version=2),
        same(EXPERT, parameters={"lr": 0.2, "steps": 10}),
        same(EXPERT, inputs={"images": DATA}),
        same(EXPERT, inputs={"data": same(DATA, parameters={"seed": 1})}),
    ]
    keys = {recipe.key for recipe in [EXPERT, *others]}
    assert len(keys) == len(others) + 1
    order = {"steps": 10, "lr": 0.1}
    alike = same(EXPERT, parameters=order, training_steps=5, denoiser_calls=7, label="x", job="a")
    assert alike.key == EXPERT.key and alike.name == f"x-{EXPERT.key}"


# making and loading


def test_an_artefact_is_made_once(store):
    build = Builder()
    assert not store.holds(EXPERT)
    with pytest.raises(StoreError, match=rf"{EXPERT.name} is not in"):
        store.load(EXPERT)
    made = store.make(EXPERT, build)
    again = store.make(EXPERT, build)
    assert store.holds(EXPERT) and build.builds == 1
    assert again == made == store.load(EXPERT)
    assert made.results == {"loss": 0.5}
    assert set(made.record["files"]) == {"deep/weights.bin", "notes.txt"}
    assert made.record["parameters"] == EXPERT.parameters
    assert made.record["inputs"] == {"data": DATA.name}


def test_missing_lists_what_must_be_made_upstream_first(store):
    merged = Recipe("merged", "merged", {}, {"expert": EXPERT, "data": DATA})
    assert store.missing(merged) == [DATA, EXPERT, merged]
    store.make(DATA, Builder())
    assert store.missing(merged) == [EXPERT, merged]
    store.make(merged, Builder())
    assert store.missing(merged) == []


def test_rates_are_medians_of_what_was_recorded_of_the_same_data(store):
    assert rates(store, DATA.name) == (STEP_S, CALL_S)
    recipes = [same(EXPERT, parameters={"seed": k}, training_steps=10) for k in range(3)]
    middle = statistics.median(store.make(r, Builder()).record["seconds"] for r in recipes)
    assert rates(store, DATA.name) == (middle / 10, CALL_S)
    assert rates(store, "data-of-another-experiment") == (STEP_S, CALL_S)


# damage


def change(folder, name, content):
    (folder / name).write_bytes(content)
    return name


def edit_record(folder, **changes):
    path = folder / "record.json"
    record = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in record.items() if v is not None}))
    return path


DAMAGES = {
    "one byte": lambda folder: change(folder, "deep/weights.bin", b"\xff" + bytes(range(1, 100))),
    "foreign file": lambda folder: change(folder, "foreign.txt", b""),
    "file removed": lambda folder: (folder / "notes.txt").unlink() or "notes.txt",
    "cut record": lambda folder: change(folder, "record.json", b'{"name": "exp'),
    "no record": lambda folder: change(folder, "record.json", b"[]"),
    "edited result": lambda folder: edit_record(folder, results={"loss": 0.4}),
    "no checksum": lambda folder: edit_record(folder, results={"loss": 0.4}, checksum=None),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_an_error_that_names_the_file_and_the_remedy(store, damage):
    build = Builder()
    folder = store.make(EXPERT, build).path
    named = DAMAGES[damage](folder)
    with pytest.raises(StoreError) as caught:
        store.make(EXPERT, build)
    message = str(caught.value)
    assert str(named) in message and str(folder) in message and "delete" in message
    assert build.builds == 1


def test_what_lies_in_an_artefact_s_place_is_not_written_over(store):
    folder = store.make(EXPERT, Builder()).path
    (folder / "record.json").unlink()
    with pytest.raises(StoreError, match=r"lacks its record.json: delete it"):
        store.make(EXPERT, Builder())
    assert (folder / "notes.txt").read_text() == "whole"


# failure and interruption


def test_what_a_stage_resumes_from_is_no_part_of_the_artefact(store):
    def build(folder):
        (folder / CHECKPOINT).write_text("step 7")
        return Builder()(folder)

    made = store.make(EXPERT, build)
    assert not [name for name in made.record["files"] if WORKING in name]
    assert not (made.path / WORKING).exists()
    (made.path / WORKING).mkdir()
    (made.path / CHECKPOINT).write_text("a kill came between the rename and its removal")
    assert store.load(EXPERT) == made


def test_nothing_else_from_before_gets_into_the_artefact(store):
    partial = store.partial(EXPERT)
    (partial / WORKING).mkdir(parents=True)
    (partial / "pipeline").mkdir()
    for name in (CHECKPOINT, "foreign.bin", "record.json", "pipeline/a.bin"):
        (partial / name).write_text("{}")
    seen = []
    made = store.make(EXPERT, lambda folder: seen.extend(folder.rglob("*")) or Builder()(folder))
    assert seen == [partial / WORKING, partial / CHECKPOINT]
    assert set(made.record["files"]) == {"deep/weights.bin", "notes.txt"}


# the machine gives out


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            SafetensorError("I/O error: No space left on device (os error 28)"),
            "cannot write.*free some disk",
        ),
        (OSError(errno.EROFS, "Read-only file system"), "cannot write.*set runs_dir"),
        (MemoryError(), "memory ran out.*sampling_batch"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "memory ran out"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_what_the_machine_refuses_is_explained_and_loses_nothing(store, error, words):
    def fail(folder):
        (folder / CHECKPOINT).write_text("step 7")
        raise error

    with pytest.raises(ResourceError, match=rf"{EXPERT.name} was not made: {words}"):
        store.make(EXPERT, fail)
    assert not store.holds(EXPERT)
    assert (store.partial(EXPERT) / CHECKPOINT).read_text() == "step 7"
    assert store.make(EXPERT, Builder()).results == {"loss": 0.5}


def test_other_errors_are_left_alone(store, tmp_path):
    """Also a refusal outside the store, which is not its folder's fault."""

    def fail(error):
        raise error

    outside = PermissionError(errno.EACCES, "refused", str(tmp_path / "data" / "images.png"))
    for error in (RuntimeError("shapes differ"), FileNotFoundError(errno.ENOENT, "gone"), outside):
        with pytest.raises(type(error)) as caught:
            store.make(EXPERT, lambda folder, error=error: fail(error))
        assert caught.value is error and not store.folder(EXPERT).exists()
    inside = PermissionError(errno.EACCES, "refused", str(store.root / "weights.bin"))
    with pytest.raises(ResourceError, match=r"cannot write to .*set runs_dir"):
        store.make(EXPERT, lambda folder: fail(inside))


@pytest.mark.parametrize("runs", ["a-file/runs", "/dev/null/runs"])
def test_a_runs_folder_that_cannot_be_is_explained(tmp_path, runs):
    (tmp_path / "a-file").touch()
    with pytest.raises(ResourceError, match=r"cannot write to .*set runs_dir"):
        Store(tmp_path / runs).make(EXPERT, Builder())


def test_two_that_ask_at_once_build_once(store, monkeypatch):
    """The lock is the file's: whoever holds it, thread or process, the others wait."""
    builds, said, go = [], [], Event()
    tell = lambda text, **_: said.append(text)  # noqa: E731  captured output is lost while read
    monkeypatch.setattr("deme_lib.experiment.store.print", tell, raising=False)

    def build(folder):
        builds.append(folder)
        assert go.wait(60)
        return {}

    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(store.make, DATA, build) for _ in range(2)]
        while not said and len(builds) < 2:
            time.sleep(0.01)
        go.set()
    assert ["another process is making it" in text for text in said] == [True]
    assert [a.result() for a in asked] == [store.load(DATA)] * 2 and len(builds) == 1
