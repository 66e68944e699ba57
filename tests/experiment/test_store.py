"""Artefacts: whole or absent, made once, checked when loaded."""

import dataclasses
import errno
import json
import resource
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from deme_lib.experiment.store import CHECKPOINT, Recipe, ResourceError, Store, StoreError

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


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.text(), values, max_size=4))
def test_a_key_survives_being_written_and_read(parameters):
    again = json.loads(json.dumps(parameters))
    assert same(EXPERT, parameters=again).key == same(EXPERT, parameters=parameters).key


@given(st.text(min_size=1, max_size=8))
def test_no_label_leaves_the_store(label):
    store = Store("runs")
    try:
        folder = store.folder(same(DATA, label=label))
    except StoreError:
        return
    assert folder.resolve().parent == store.root.resolve() and not folder.name.startswith(".")


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


def edit_record(folder, **changes):
    path = folder / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def change_a_result(folder):
    return edit_record(folder, results={"loss": 0.4})


def change_a_parameter(folder):
    return edit_record(folder, parameters={"lr": 0.2, "steps": 10}, checksum=None)


def name_an_input_elsewhere(folder):
    return edit_record(folder, inputs={"data": "../../elsewhere"}, checksum=None)


def name_a_file_elsewhere(folder):
    edit_record(folder, files={"../../etc/passwd": "0" * 64}, checksum=None)
    return "../../etc/passwd"


def name_an_absolute_file(folder):
    edit_record(folder, files={"/etc/passwd": "0" * 64}, checksum=None)
    return "/etc/passwd"


def link_a_file(folder):
    path = folder / "notes.txt"
    path.rename(folder.parent / "elsewhere.txt")
    path.symlink_to(folder.parent / "elsewhere.txt")
    return path


def link_a_folder(folder):
    (folder / "more").symlink_to(folder.parent)
    return folder / "more"


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
        change_a_result,
        change_a_parameter,
        name_an_input_elsewhere,
        name_a_file_elsewhere,
        name_an_absolute_file,
        link_a_file,
        link_a_folder,
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


def test_what_a_stage_resumes_from_is_no_part_of_the_artefact(store):
    def build(folder):
        (folder / CHECKPOINT).write_text("step 7")
        return Builder()(folder)

    made = store.make(EXPERT, build)
    assert CHECKPOINT not in made.record["files"] and not (made.path / CHECKPOINT).exists()
    (made.path / CHECKPOINT).write_text("a kill came between the rename and its removal")
    assert store.check(EXPERT) == made
    assert (made.path / CHECKPOINT).exists()
    assert store.load(EXPERT) == made
    assert not (made.path / CHECKPOINT).exists()


def test_a_record_from_before_checksums_is_whole(store):
    made = store.make(EXPERT, Builder())
    record = {name: value for name, value in made.record.items() if name != "checksum"}
    (made.path / "record.json").write_text(json.dumps(record))
    assert store.load(EXPERT).record == record


# the machine gives out


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no room left.*free some disk space"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "no room left.*free some disk space"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "no room left"),
        (OSError(errno.EROFS, "Read-only file system"), "cannot write.*set runs_dir"),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot write.*set runs_dir"),
        (MemoryError(), "memory ran out.*sampling_batch"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "memory ran out"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), "memory ran out"),
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
    kept = store.root / ".partial" / EXPERT.name / CHECKPOINT
    assert kept.read_text() == "step 7"
    assert store.make(EXPERT, Builder()).results == {"loss": 0.5}


def test_other_errors_are_left_alone(store):
    for error in (RuntimeError("shapes differ"), FileNotFoundError(errno.ENOENT, "no such file")):
        with pytest.raises(type(error), match=str(error.args[-1])) as caught:
            store.make(EXPERT, lambda folder, error=error: (_ for _ in ()).throw(error))
        assert not isinstance(caught.value, ResourceError)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.ENOTDIR])
def test_only_a_refusal_inside_the_store_is_put_down_to_it(store, tmp_path, number):
    def fail(path):
        raise OSError(number, "refused", str(path))

    with pytest.raises(ResourceError, match=r"cannot write to .*set runs_dir"):
        store.make(EXPERT, lambda folder: fail(folder / "weights.bin"))
    with pytest.raises(OSError, match="refused") as caught:
        store.make(EXPERT, lambda folder: fail(tmp_path / "data" / "images.png"))
    assert not isinstance(caught.value, ResourceError)


@pytest.mark.parametrize("runs", ["a-file/runs", "a-file", "/proc/deme", "/dev/null/runs"])
def test_a_runs_folder_that_cannot_be_is_explained(tmp_path, runs):
    (tmp_path / "a-file").touch()
    with pytest.raises(ResourceError, match=r"cannot write to .*set runs_dir"):
        Store(tmp_path / runs).make(EXPERT, Builder())


def test_a_file_that_outgrows_its_limit_is_explained(store):
    """A real refusal of the operating system, by a limit on the size of files."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, old[1]))
    try:
        with pytest.raises(ResourceError, match="no room left"):
            store.make(EXPERT, Builder())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert not store.holds(EXPERT)
    assert store.make(EXPERT, Builder()).results == {"loss": 0.5}


SCRIPT = """
import os, sys, time
from pathlib import Path
from deme_lib.experiment.store import Recipe, Store

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
