"""Killed anywhere, a run started again ends with the bytes of one that nobody killed.

Children are forked from a server that has imported torch already, so that a kill costs little.
"""

import contextlib
import importlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import yaml
from safetensors import safe_open
from test_stages import TINY

from deme_lib import ROOT
from deme_lib.diffusion.training import Training
from deme_lib.experiment import parameters, recipes, stages
from deme_lib.experiment.store import CHECKPOINT, Store

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
ENOUGH = 40  # restarts after which a run that never ends is a failure
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["deme_lib.stages", "deme_lib.stages.train"])


def tiny(runs, **changes):
    return parameters.load("params/smoke.yaml", **TINY | {"runs_dir": str(runs)} | changes)


def run(labels, runs, steps=None):
    """A child's work: make artefacts, quietly; note each training step in a file."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has it ignored
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1), os.dup2(quiet, 2)
    if steps is not None:
        count_steps(steps)
    p = tiny(runs)
    every = recipes.everything(p)
    stages.make_all([every[label] for label in labels or every], p)


def count_steps(file):
    original = Training._step

    def step(self, number):
        found = original(self, number)
        if "timing" not in self.spec.purpose:  # the estimate's own steps
            with open(file, "a") as log:
                log.write(f"{self.spec.purpose[-1]} {number}\n")
        return found

    Training._step = step


def start(*arguments):
    child = FORK.Process(target=run, args=arguments)
    child.start()
    return child


def contents(runs):
    """Every artefact of a store by name: its files' hashes and its results."""
    p = tiny(runs)
    store = Store(runs)
    made = [store.load(r) for r in recipes.everything(p).values() if store.holds(r)]
    return {a.path.name: (a.record["files"], a.results) for a in made}


def nothing_left(runs):
    store = Store(runs)
    return not list(store.root.glob(".partial/*")) and not list(store.root.rglob(CHECKPOINT))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run that nobody killed makes, and how long it takes."""
    runs = tmp_path_factory.mktemp("whole")
    child, began = start(None, runs), time.monotonic()
    child.join()
    assert child.exitcode == 0
    return contents(runs), time.monotonic() - began


def killed_until_done(runs, rng, longest, most=ENOUGH):
    """Start, kill after a random time, and again, until a run ends by itself; the kills."""
    steps, kills = runs / "steps", []
    while True:
        child, patience = start(None, runs, steps), rng.uniform(0, longest)
        child.join(patience if len(kills) < most else None)
        if child.exitcode is not None:
            assert child.exitcode == 0
            return kills
        number = rng.choice(SIGNALS)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, number)
        child.join(10)
        if number == signal.SIGINT and child.exitcode is None:
            child.kill()  # Python drops a KeyboardInterrupt that is raised in a finaliser
            child.join(10)
        assert child.exitcode is not None, f"{number.name} did not end it in 10 s"
        if child.exitcode != 0:  # it may have ended just before
            kills.append(number)
        contents(runs)  # whatever the store holds is whole


def lost_steps(runs):
    """The most steps done again after one kill, over all trainings."""
    lost, last = 0, {}
    for line in (runs / "steps").read_text().splitlines():
        name, step = line.split()
        lost = max(lost, last.get(name, -1) + 1 - int(step))
        last[name] = int(step)
    return lost


def check_killed(runs, seed, whole, most):
    expected, seconds = whole
    runs.mkdir()
    kills = killed_until_done(runs, random.Random(seed), seconds / 2, most)
    assert contents(runs) == expected
    assert nothing_left(runs)
    assert lost_steps(runs) <= TINY["checkpoint_every"]
    return len(kills)


def test_a_run_killed_at_random_moments_ends_the_same(tmp_path, whole):
    assert check_killed(tmp_path / "runs", 0, whole, most=6) >= 3


@pytest.mark.stress
def test_many_runs_killed_at_random_moments_end_the_same(tmp_path, whole, capsys):
    kills = []
    for seed in range(1, 11):
        kills.append(check_killed(tmp_path / f"runs{seed}", seed, whole, ENOUGH))
        with capsys.disabled():
            print(f"\n{sum(kills)} kills over {len(kills)} runs survived", flush=True)
    assert sum(kills) >= 50


# at chosen moments


def run_and_die(module, name, when, labels, runs):
    """As ``run``, but this process kills itself ``before`` or ``after`` it calls a function."""
    where = importlib.import_module(module)
    original = getattr(where, name)

    def function(*args, **kwargs):
        if when == "after":
            original(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(where, name, function)
    run(labels, runs)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("module", "name"), [("os", "rename"), ("deme_lib.models", "save_pipeline")], ids=lambda x: x
)
def test_killed_after_the_last_step_no_step_is_lost(tmp_path, whole, module, name, when):
    start(["data"], tmp_path).join(60)
    arguments = (module, name, when, ["baseline"], tmp_path)
    child = FORK.Process(target=run_and_die, args=arguments)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    recipe, store = recipes.baseline(tiny(tmp_path)), Store(tmp_path)
    assert store.holds(recipe) == ((name, when) == ("rename", "after"))
    again = start(["baseline"], tmp_path, tmp_path / "steps")
    again.join(60)
    assert again.exitcode == 0 and not (tmp_path / "steps").exists()
    assert contents(tmp_path).items() <= whole[0].items()
    assert nothing_left(tmp_path)


def test_two_at_once_make_everything_once(tmp_path, whole):
    both = [start(["merged"], tmp_path, tmp_path / f"steps{i}") for i in range(2)]
    for child in both:
        child.join(120)
    assert [child.exitcode for child in both] == [0, 0]
    lines = [
        line
        for i in range(2)
        if (tmp_path / f"steps{i}").exists()
        for line in (tmp_path / f"steps{i}").read_text().splitlines()
    ]
    assert lines and len(set(lines)) == len(lines)
    assert contents(tmp_path).items() <= whole[0].items()


# real processes


@pytest.fixture
def preset(tmp_path):
    """A preset of the tiny experiment whose baseline trains for some seconds."""
    smoke = yaml.safe_load((ROOT / "params" / "smoke.yaml").read_text())
    values = smoke | TINY | {"pretrain_steps": 800, "checkpoint_every": 20, "experiment": "mine"}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values | {"runs_dir": str(tmp_path / "runs")}))
    return path


def launch(*arguments):
    command = [sys.executable, "-m", *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def position(file):
    try:
        with safe_open(file, "pt") as checkpoint:
            return int(checkpoint.metadata()["position"])
    except FileNotFoundError:
        return 0


def wait_for_checkpoint(runs, process, beyond=0):
    """The position of a run's checkpoint, once it is beyond another."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        for file in runs.glob(f"store/.partial/baseline-*/{CHECKPOINT}"):
            if (found := position(file)) > beyond:
                return found
        time.sleep(0.02)
    pytest.fail(f"no checkpoint beyond {beyond}: {process.communicate()}")


def test_the_command_line_goes_on_where_it_was_stopped(tmp_path, preset):
    command = ("deme_lib", "make", "baseline", "-f", preset)
    process = launch(*command)
    reached = wait_for_checkpoint(tmp_path / "runs", process)
    process.terminate()
    assert process.wait(5) == -signal.SIGTERM
    again = launch(*command)
    assert wait_for_checkpoint(tmp_path / "runs", again) >= reached
    _, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    p = parameters.load(preset)
    assert Store(p.runs_dir).load(recipes.baseline(p)).results["history"][-1]["step"] == 800
    assert nothing_left(tmp_path / "runs")


def kernels_of(process):
    """Ids of a process's children."""
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as children:
        return [int(child) for child in children.read().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="looks for the kernel in /proc")
def test_a_notebook_goes_on_after_its_kernel_and_papermill_were_killed(tmp_path, preset):
    runs, out = tmp_path / "runs", tmp_path / "out.ipynb"
    notebook = ROOT / "notebooks" / "01_baseline.ipynb"
    command = ("papermill", "--no-progress-bar", notebook, out, "-f", preset)

    process = launch(*command)
    reached = wait_for_checkpoint(runs, process)
    for kernel in kernels_of(process):
        os.kill(kernel, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 138 and b"Kernel died" in errors
    begun = [
        c for c in json.loads(out.read_text())["cells"] if c["metadata"]["papermill"]["start_time"]
    ]
    assert "recipes.baseline" in "".join(begun[-1]["source"])  # where it died

    process = launch(*command)
    wait_for_checkpoint(runs, process, beyond=reached)
    kernels = kernels_of(process)
    process.kill()
    process.wait()
    for kernel in kernels:
        with contextlib.suppress(ProcessLookupError):
            os.kill(kernel, signal.SIGKILL)

    again = launch(*command)
    _, errors = again.communicate(timeout=180)
    assert again.returncode == 0, errors
    cells = json.loads(out.read_text())["cells"]
    assert all(c["metadata"]["papermill"]["start_time"] for c in cells)
    assert nothing_left(runs)
