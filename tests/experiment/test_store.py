"""Artefacts: whole or absent, made once, checked when loaded."""

import dataclasses
import json
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Event

import pytest

from deme_lib.experiment import store
from deme_lib.experiment.store import Artefact, Machine, Source, StoreError, make


def half(x):
    return x / 2


def double(x):
    return 2 * x


def write(job, *, text, upstream=None, function=None, source=None):
    """A stage: notes in a file what it was given."""
    (job.out / "deep").mkdir()
    (job.out / "deep" / "notes.txt").write_text(text)
    if upstream:
        (job.out / "upstream.txt").write_text((upstream / "deep" / "notes.txt").read_text())
    if source:
        (job.out / "source.txt").write_text(source)


@pytest.fixture
def on(tmp_path):
    return Machine("cpu", 1, 10, 10, str(tmp_path))


def artefact(on, label="notes", stage=write, **arguments):
    return Artefact(label, stage, {"text": "whole", **arguments}, on)


def test_the_key_knows_what_changes_results_and_nothing_else(on, monkeypatch):
    first = artefact(on, upstream=artefact(on), function=half, source=Source("a", "content"))
    others = [
        artefact(on, text="other"),
        artefact(on, upstream=artefact(on, text="other")),
        artefact(on, upstream=artefact(on), function=double),
        artefact(on, upstream=artefact(on), function=half, source=Source("a", "other")),
        artefact(on),
        artefact(on, label="renamed"),
    ]
    assert len({a.name for a in [first, *others]}) == len(others) + 1
    elsewhere = dataclasses.replace(on, device="cuda", threads=9, sampling_batch=1, runs_dir="x")
    moved = dataclasses.replace(first, on=elsewhere, arguments={**first.arguments})
    moved.arguments["source"] = Source("/somewhere/else", "content")
    assert moved.name == first.name
    before = artefact(on).name
    monkeypatch.setattr(write, "version", 2, raising=False)
    assert artefact(on).name != before


def test_a_function_must_be_told_by_its_source(on):
    def times(k):
        return lambda x: k * x

    for function in (times(2), partial(half, 2)):
        with pytest.raises(StoreError, match="write a plain function"):
            _ = artefact(on, function=function).name


def test_an_artefact_is_made_once_with_what_it_needs(on, capsys):
    first, second = artefact(on), artefact(on, "second", upstream=artefact(on))
    folder = make(second)
    assert (folder / "upstream.txt").read_text() == "whole"
    assert make([first, second]) == [first.folder, folder]
    assert capsys.readouterr().out.split() == ["making", first.name, "making", second.name]
    assert not list(on.store.glob(".partial/*"))
    record = json.loads(second.record.read_text())
    assert record["arguments"]["upstream"] == first.name and record["device"] == "cpu"
    assert {"commit", "versions", "seconds"} <= record.keys()


def test_a_source_counts_by_content_and_arrives_by_name(on):
    folder = make(artefact(on, source=Source("my-folder", "hash of what is in it")))
    assert (folder / "source.txt").read_text() == "my-folder"
    assert "my-folder" not in (folder / "record.json").read_text()


DAMAGES = {
    "one byte": lambda folder: (folder / "deep" / "notes.txt").write_text("whale"),
    "foreign file": lambda folder: (folder / "foreign.txt").write_text(""),
    "file removed": lambda folder: (folder / "deep" / "notes.txt").unlink(),
    "cut record": lambda folder: (folder / "record.json").write_text('{"label": "no'),
    "no record's content": lambda folder: (folder / "record.json").write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_an_error_that_names_the_folder_and_the_remedy(on, damage):
    folder = make(artefact(on))
    DAMAGES[damage](folder)
    store._check.cache_clear()  # as in another process
    with pytest.raises(StoreError, match=r"[Dd]elete") as caught:
        make(artefact(on))
    assert str(folder) in str(caught.value)


def test_what_failed_leaves_its_work_and_nothing_that_counts(on):
    seen = []

    def fail_once(job, *, text):
        (job.out / "half.txt").write_text("half")
        if not list(job.work.iterdir()):
            (job.work / "checkpoint").write_text("step 7")
            raise MemoryError("it ran out")
        seen.append((job.work / "checkpoint").read_text())
        (job.out / "whole.txt").write_text(text)

    wanted = artefact(on, stage=fail_once)
    with pytest.raises(MemoryError, match="it ran out"):
        make(wanted)
    assert not wanted.folder.exists()
    partial = on.store / ".partial" / wanted.name
    (partial / "out" / "foreign.txt").write_text("from before")
    assert {p.name for p in make(wanted).iterdir()} == {"half.txt", "record.json", "whole.txt"}
    assert seen == ["step 7"] and not partial.exists()


def test_two_that_ask_at_once_build_once(on, monkeypatch):
    """The lock is the file's: whoever holds it, thread or process, the others wait."""
    builds, said, go = [], [], Event()
    monkeypatch.setattr(store, "print", lambda text, **_: said.append(text), raising=False)

    def slow(job, *, text):
        builds.append(job)
        assert go.wait(60)

    wanted = artefact(on, stage=slow)
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(make, wanted) for _ in range(2)]
        while not any("another process" in text for text in said) and len(builds) < 2:
            time.sleep(0.01)
        go.set()
    assert [a.result() for a in asked] == [wanted.folder] * 2 and len(builds) == 1
