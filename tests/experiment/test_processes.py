"""One job in 1, 2 or 4 processes, which meet through gloo: the same results, made once."""

import os
import shutil
import socket
import sys

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file

from deme_lib.__main__ import main
from deme_lib.diffusion.models import load_unet
from deme_lib.diffusion.training import Training
from deme_lib.experiment import processes, recipes, stages
from deme_lib.experiment.arms import ARMS
from deme_lib.experiment.processes import ProcessError
from deme_lib.experiment.store import CHECKPOINT, Store

UNEVEN = {"batch_size": 5, "samples": 14, "sampling_batch": 3, "acceptance_samples": 14}
UNEVEN |= {"arms": ["pretrained", "all_plain", "deme_merged", "reweighted"], "model_channels": [16]}
UNEVEN |= {"loss_weighting": "uncertainty", "primary_decoupling": [], "primary_merging": []}
FIRST = "images.safetensors"
NAMES = ("deme-1of2", "all-uncertainty", "images-pretrained")


def experiment(runs, **changes):
    return tiny.experiment(runs, **UNEVEN | changes)


def child(runs, names, rank, count, port, fails_at):
    """One process of a job; the last fails at a step."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    quiet = os.open(f"{runs}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(quiet, 1), os.dup2(quiet, 2)
    original = Training._step

    def step(run, number):
        if number == fails_at and rank == count - 1:
            raise RuntimeError("a device gave out")
        return original(run, number)

    Training._step = step
    sys.exit(main(["make", *names, "-f", f"{runs}.yaml"]))


def job(runs, names, count, fails_at=None):
    """Exit statuses of ``count`` processes that make ``names``."""
    with open(f"{runs}.yaml", "w") as file:
        yaml.safe_dump(experiment(runs).model_dump(), file)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        tiny.FORK.Process(target=child, args=(runs, names, rank, count, port, fails_at))
        for rank in range(count)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(200)
    return [process.exitcode for process in started]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folders that 1, 2 and 4 processes worked in, from one pretrained model.

    Two processes take up a finetuning that one left and lost one of their own on the way.
    """
    folder = tmp_path_factory.mktemp("processes")
    assert job(folder / "1", ["baseline"], 1) == [0]
    for count in (2, 4):
        shutil.copytree(folder / "1", folder / f"{count}")
    assert job(folder / "2", NAMES, 1, fails_at=3) == [1]
    checkpoint = Store(folder / "2").partial(recipes.finetuned(experiment(folder / "2"), "deme")[0])
    assert (checkpoint / CHECKPOINT).is_file()
    failed = job(folder / "2", NAMES, 2, fails_at=5)
    assert all(failed) and "a device gave out" in (folder / "2.log").read_text()
    for count in (1, 2, 4):
        assert job(folder / f"{count}", NAMES, count) == [0] * count, folder / f"{count}.log"
    return {count: folder / f"{count}" for count in (1, 2, 4)}


def load(runs, recipe):
    return Store(runs).load(recipe(experiment(runs))).path


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("family", ["deme", "reweighted"])
def test_the_same_batches_train_the_same_weights(made, family, count):
    """Sums of floats in another order; the steps themselves move the weights by a hundredth."""

    def weights(runs):
        folder = load(runs, lambda p: recipes.finetuned(p, family)[0]) / "unet"
        return torch.cat([w.flatten() for w in load_unet(folder).parameters()])

    one, other = weights(made[1]), weights(made[count])
    assert (one - other).norm() < 1e-5 * one.norm()


@pytest.mark.parametrize("count", [2, 4])
def test_the_same_images_are_sampled(made, count):
    def images(runs):
        return load_file(load(runs, lambda p: recipes.images(p, ARMS["pretrained"])) / FIRST)

    one, other = (images(made[n])["seed0"].int() for n in (1, count))
    assert one.shape == other.shape == (14, 1, 8, 8)
    assert (one - other).abs().max() <= 1
    assert len(one.unique(dim=0)) == 14


def test_artefacts_are_written_by_one_process(made):
    logs = [(path.with_name(f"{path.name}.log")).read_text() for path in made.values()]
    assert not list(made[4].glob("store/.partial/*"))
    assert logs[2].count("made now: deme-1of2") == 1


def test_a_notebook_starts_processes_of_its_own(tmp_path, capfd):
    """Whose refusal it shows; what it makes is loaded as ever."""
    p = experiment(tmp_path / "runs", processes=2, batch_size=1)
    with pytest.raises(ProcessError, match=r"batch_size=1 is too small for 2 processes"):
        stages.make(recipes.baseline(p), p)
    p = experiment(tmp_path / "runs", processes=2)
    assert stages.make(recipes.baseline(p), p).results == {}
    assert "made now: baseline" in capfd.readouterr().out
    assert processes.count() == 1
