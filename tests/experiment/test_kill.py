"""Killed anywhere, a run started again ends with the bytes of one that nobody killed."""

import importlib
import json
import os
import signal

import pytest
from tiny import FORK, SIZES, experiment

from deme_lib.diffusion.training import Training
from deme_lib.experiment import graph
from deme_lib.experiment.arms import ALL_PLAIN, ARMS
from deme_lib.experiment.store import make


def wanted(runs):
    p = experiment(runs).per_seed()[0]
    return [*graph.copies(p, ALL_PLAIN), graph.images(p, ARMS["all_plain"])]


def run(runs, module=None, name=None, call=0, when="before"):
    """A child's work: pretrain, finetune, sample, note each step; die at one call of a function."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1), os.dup2(quiet, 2)
    noted(Training, "_step", lambda number: log(runs, number))
    if module:
        calls = iter(range(10**9))

        def die(*_, **__):
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)

        where, *inside = module.split(":")
        where = importlib.import_module(where)
        noted(getattr(where, inside[0]) if inside else where, name, die, when)
    make(wanted(runs))


def noted(owner, name, note, when="before"):
    """Have ``note`` called before or after every call of a function, with its last argument."""
    original = getattr(owner, name)

    def function(*args, **kwargs):
        if when == "before":
            note(args[-1])
        found = original(*args, **kwargs)
        if when == "after":
            note(args[-1])
        return found

    setattr(owner, name, function)


def log(runs, number):
    with open(f"{runs}.steps", "a") as file:
        file.write(f"{number}\n")


def child(*arguments):
    process = FORK.Process(target=run, args=arguments)
    process.start()
    process.join(120)
    return process.exitcode


def contents(runs):
    """The content hash of every artefact that is there, checked, by name."""
    every = [u for a in wanted(runs) for u in (*a.upstream(), a)]
    there = [a for a in every if a.record.is_file()]
    return {make(a).name: json.loads(a.record.read_text())["content"] for a in there}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run that nobody killed makes."""
    runs = tmp_path_factory.mktemp("whole") / "runs"
    assert child(runs) == 0
    assert len(contents(runs)) == 4  # data, baseline, copy, images
    return contents(runs)


MOMENTS = [
    ("deme_lib.diffusion.training:Training", "_step", 5, "after"),
    ("deme_lib.diffusion.training:Training", "_step", 19, "before"),
    ("deme_lib.diffusion.training", "save_file", 1, "after"),  # written, not yet renamed
    ("deme_lib.diffusion.training", "save_file", 6, "before"),
    ("deme_lib.diffusion.heldout:FixedNoise", "loss", 9, "before"),  # in a look at the losses
    ("deme_lib.diffusion.models", "save_pipeline", 0, "after"),
    ("deme_lib.experiment.stages.judge", "save_file", 0, "after"),  # images, not yet renamed
    ("shutil", "copy", 0, "after"),
    ("os", "rename", 1, "before"),
    ("os", "rename", 1, "after"),
    ("os", "rename", 2, "before"),
]


@pytest.mark.parametrize(("module", "name", "call", "when"), MOMENTS, ids=lambda x: str(x)[-12:])
def test_killed_at_a_chosen_moment(tmp_path, whole, module, name, call, when):
    runs = tmp_path / "runs"
    assert child(runs, module, name, call, when) == -signal.SIGKILL
    contents(runs)  # whatever the store holds is whole
    assert child(runs) == 0
    assert contents(runs) == whole
    steps = [int(line) for line in (tmp_path / "runs.steps").read_text().split()]
    assert len(steps) <= 8 + 16 + SIZES["checkpoint_every"]  # no more is done twice
